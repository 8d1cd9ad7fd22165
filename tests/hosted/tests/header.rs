//! The C header, and a guest in C that reads what the hypervisor's side wrote.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use channel::{
    Record,
    guest::Frames,
    header,
    host::{Host, Pushed},
    invalidate::{Layout, Range, Request as Forget, handle},
    record::{Event, Reason, Request},
    ring::{FRAMES, HEADER},
};
use hosted::Window;
use iommu::{Iova, Pasid, Perms};
use models::memory::Memory;
use std::{
    env,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const FRAME_WORDS: usize = 512;

#[test]
fn the_header_is_what_the_constants_say() {
    let mut printed = String::new();
    header::write(&mut printed).expect("a string takes everything");

    let checked_in = include_str!("../../../drivers/channel/include/portcullis.h");
    assert!(
        printed == checked_in,
        "the layout changed; `cargo run -p channel --example header > drivers/channel/include/portcullis.h` makes the header anew"
    );
}

/// Compiles the guest in C. `None` if there is no compiler, which only CI has to have.
fn compile(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-I"])
        .arg(root.join("../../drivers/channel/include"))
        .arg("-o")
        .arg(&program)
        .arg(root.join("c/guest.c"))
        .output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(program)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let missing = "there is no C compiler `cc` to check the header with: install gcc or clang";
            assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "{missing}");
            eprintln!("SKIPPED: {missing}");
            None
        }
        Err(error) => panic!("cc: {error}"),
    }
}

/// Runs the guest in C on the frames that `window` shows.
fn run(program: &Path, window: &Window) -> String {
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it was compiled for this machine");
    let bytes: Vec<u8> = (0..FRAMES)
        .flat_map(|frame| (0..FRAME_WORDS).map(move |word| (frame, word)))
        .flat_map(|(frame, word)| window.load(frame, word).to_le_bytes())
        .collect();
    child.stdin.take().expect("it is piped").write_all(&bytes).expect("the guest reads all of it");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{:?}", output.status);
    String::from_utf8(output.stdout).expect("it prints text")
}

fn open(first: u64) -> (Host, Window) {
    let memory = Memory::new(FRAMES * FRAME_WORDS);
    let frames = [(); FRAMES].map(|()| memory.take(FRAME_WORDS, FRAME_WORDS));
    let start = frames[0].phys();
    (Host::counting_from(first, frames), Window::new(memory, start))
}

#[test]
fn a_guest_in_c_reads_what_the_hypervisor_shows() {
    let Some(program) = compile("reads") else { return };
    // So that both rings go around their end, and the indices wrap.
    let (mut host, window) = open(u64::MAX - 1);
    let page = |index| Request {
        cookie: 0x0102_0304_0506_0708,
        device: 0xA1B2_C3D4,
        pasid: Pasid::new(0x1_2345),
        opaque: 0xFEED_F00D_0000_0001,
        group: 0x1FF,
        iova: Iova(0x7F00_0000_1000 + (u64::from(index) << 12)),
        perms: Perms { privileged: index == 2, ..Perms::READ_WRITE },
        pages: 3,
        index,
    };
    assert_eq!(host.push_group((0..3).map(|index| Record::request(&page(index)))), Ok(Pushed::Yes));
    host.count_lost_requests(4);
    host.count_lost_events(2);
    let event = Event {
        number: 0,
        lost: 0,
        device: 1,
        pasid: None,
        opaque: 9,
        iova: Iova(0x4000_0000),
        perms: Perms { execute: true, ..Perms::READ },
        reason: Reason::AddressSize,
    };
    assert_eq!(host.push_event(&event), Ok(Pushed::Yes));
    host.count_lost_events(3);

    let printed = run(&program, &window);

    // Number, address, opaque, device, PASID in hexadecimal; kind, access, privileged; group in hexadecimal; reason,
    // pages, index, lost.
    let expected = "\
request 102030405060708 7f0000001000 feedf00d00000001 a1b2c3d4 12345 1 3 0 1ff 0 3 0 0
request 102030405060708 7f0000002000 feedf00d00000001 a1b2c3d4 12345 1 3 0 1ff 0 3 1 0
request 102030405060708 7f0000003000 feedf00d00000001 a1b2c3d4 12345 1 3 1 1ff 0 3 2 0
event 1 40000000 9 1 ffffffff 2 4 0 0 4 0 0 2
consumed 1 18446744073709551615
lost 4 5
entry 7 5000 3 1
";
    assert_eq!(printed, expected);
    let handled = handle(Layout::Pages, &[7, 0x5000, 3, 1], 1, |request| {
        let range = Range::Pages { first: Iova(0x5000), pages: 3 };
        assert_eq!(request, Forget::Attachment { attachment: 7, range, leaf: true });
        Ok(())
    });
    assert_eq!(handled.handled, 1);
}

#[test]
fn a_guest_in_c_refuses_what_is_no_channel_of_its_version() {
    let Some(program) = compile("refuses") else { return };
    for (word, bit) in [(0, 0), (0, 63), (1, 1), (1, 33)] {
        let (host, window) = open(0);
        let mut frames = host.into_frames();
        let good = frames[HEADER].load(word);
        frames[HEADER].store(word, good ^ 1 << bit);

        assert_eq!(run(&program, &window), "no channel\n", "word {word}, bit {bit}");
    }
}
