//! The channel in every interleaving of hypervisor and guest, and with all that weak memory orders allow.
//!
//! Its source is compiled a second time, with frames that loom controls. Preemptions are bounded where it says so. Each test
//! prints how many interleavings it tried. What loom does not try: a store that is seen before a load which precedes it.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]
#![expect(unexpected_cfgs, reason = "the features of the channel are not those of this package")]
#![expect(dead_code, reason = "the models need a part of the channel")]

// Below, fences and memory are those of `under_loom`.
extern crate under_loom as core;
extern crate under_loom as iommu;

#[macro_use]
#[path = "../../../drivers/channel/src/numbered.rs"]
mod numbered;
#[path = "../../../drivers/channel/src/guest.rs"]
mod guest;
#[path = "../../../drivers/channel/src/host.rs"]
mod host;
#[path = "../../../drivers/channel/src/record.rs"]
mod record;
#[path = "../../../drivers/channel/src/ring.rs"]
mod ring;

pub use record::Record;

use guest::{Frames, Guest};
use host::{Host, Pushed};
use iommu::{DmaBuf, Iova, Perms};
use loom::thread;
use record::Request;
use ring::{FRAME_BYTES, FRAMES, RECORDS};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

/// The guest's mapping of the frames.
struct Mapped([DmaBuf; FRAMES]);

impl Frames for Mapped {
    fn load(&self, frame: usize, word: usize) -> u64 {
        self.0[frame].load(word)
    }

    fn store(&self, frame: usize, word: usize, value: u64) {
        self.0[frame].put(word, value);
    }
}

/// A channel, seen from both sides.
fn channel() -> (Host, Guest<Mapped>) {
    let frames = [0; FRAMES].map(|_| DmaBuf::new(FRAME_BYTES / 8));
    let host = Host::new(frames.clone());
    (host, Guest::open(Mapped(frames)).expect("it is one of this version"))
}

/// Page `index` of the group with this cookie, which has so many pages; each word of the record tells whose it is.
fn request(cookie: u64, pages: u32, index: u32) -> Request {
    Request {
        cookie,
        device: cookie as u32,
        pasid: None,
        opaque: cookie,
        group: cookie as u16,
        iova: Iova(cookie << 12),
        perms: Perms::READ,
        pages,
        index,
    }
}

fn push(host: &mut Host, cookie: u64, pages: u32) -> Pushed {
    let records = (0..pages as usize).map(|index| Record::request(&request(cookie, pages, index as u32)));
    host.push_group(records).expect("the guest keeps to the rules")
}

/// Runs `body` in every interleaving with at most so many preemptions; they end in `ends` ways.
fn model(
    name: &str,
    preemptions: Option<usize>,
    ends: usize,
    body: impl Fn() -> &'static str + Send + Sync + 'static,
) {
    let tried = Arc::new(Mutex::new(BTreeMap::new()));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    let count = Arc::clone(&tried);
    builder.check(move || *count.lock().expect("no other thread has it").entry(body()).or_insert(0) += 1);
    let tried: BTreeMap<&str, usize> = tried.lock().expect("no other thread has it").clone();
    let bound = preemptions.map_or("any number of".into(), |bound| format!("up to {bound}"));
    println!("{name}: {} interleavings, {bound} preemptions: {tried:?}", tried.values().sum::<usize>());
    assert_eq!(tried.len(), ends);
}

#[test]
fn a_group_is_seen_whole_or_not_at_all_and_each_record_as_it_was_written() {
    model("push a group, read", Some(3), 2, || {
        let (mut host, mut guest) = channel();
        let reader = thread::spawn(move || {
            let Some(first) = guest.next_request() else { return "nothing was there" };
            assert_eq!(first, request(7, 2, 0));
            assert_eq!(guest.next_request(), Some(request(7, 2, 1)), "the rest of it");
            "the group was there"
        });
        assert_eq!(push(&mut host, 7, 2), Pushed::Yes);
        reader.join().expect("it ends")
    });
}

#[test]
fn a_place_is_written_again_only_when_the_guest_has_read_what_was_there() {
    model("push into a full ring, read", Some(3), 2, || {
        let (mut host, mut guest) = channel();
        for cookie in 0..RECORDS {
            assert_eq!(push(&mut host, cookie, 1), Pushed::Yes);
        }
        let reader = thread::spawn(move || {
            assert_eq!(guest.next_request(), Some(request(0, 1, 0)), "not what came after it");
        });
        let pushed = push(&mut host, 99, 1);
        reader.join().expect("it ends");
        if pushed == Pushed::Yes { "there was room" } else { "there was none" }
    });
}

#[test]
fn what_the_guest_finds_once_it_knows_the_channel_is_all_of_its_header() {
    model("open, look for the channel", None, 2, || {
        let frames = [0; FRAMES].map(|_| DmaBuf::new(16));
        // loom wants to know a word before two threads do.
        for word in (0..16).flat_map(|word| frames.iter().map(move |frame| frame.load(word))) {
            assert_eq!(word, u64::MAX, "nothing was written yet");
        }
        let mapped = Mapped(frames.clone());
        let seeker = thread::spawn(move || match Guest::open(mapped) {
            Some(mut guest) => {
                assert_eq!(guest.next_request(), None);
                assert_eq!(guest.next_event(), None);
                "it was there"
            }
            None => "it was not there yet",
        });
        let _host = Host::new(frames);
        seeker.join().expect("it ends")
    });
}
