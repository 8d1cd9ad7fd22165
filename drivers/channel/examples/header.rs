//! Prints the C header.

fn main() {
    let mut header = String::new();
    match channel::header::write(&mut header) {
        Ok(()) => print!("{header}"),
        Err(error) => eprintln!("the header cannot be written: {error}"),
    }
}
