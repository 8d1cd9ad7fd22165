//! Links the image as a flat binary, by the linker script of its machine.

use std::env;

fn main() -> Result<(), env::VarError> {
    let folder = env::var("CARGO_MANIFEST_DIR")?;
    let script = format!("{}.ld", env::var("CARGO_CFG_TARGET_ARCH")?);
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rustc-link-arg-bins=-T{folder}/{script}");
    Ok(())
}
