//! The fault channel: the hypervisor's side and a guest's side over the same four frames.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use channel::{
    Record,
    guest::{self, Guest},
    host::{Broken, Host, Pushed},
    record::{Event, Reason, Request},
    ring::{CONSUMER, EVENTS, EVENTS_WORD, FRAMES, HEADER, RECORDS, REQUESTS, REQUESTS_WORD},
};
use hosted::{Random, Window};
use iommu::{Iova, Pasid, Perms};
use models::memory::{Memory, UNWRITTEN};
use std::collections::VecDeque;

const FRAME_WORDS: u64 = 512;

fn open() -> (Host, Window) {
    let memory = Memory::new(FRAMES * FRAME_WORDS as usize);
    let frames = [(); FRAMES].map(|()| memory.take(FRAME_WORDS as usize, FRAME_WORDS as usize));
    let start = frames[0].phys();
    (Host::new(frames), Window::new(memory, start))
}

fn guest(window: &Window) -> Guest<Window> {
    Guest::open(window.clone()).expect("the host made it")
}

fn page(cookie: u64, pages: u32, index: u32) -> Request {
    Request {
        cookie,
        device: 1,
        pasid: Pasid::new(5),
        opaque: 0xFEED,
        group: (cookie & 0x1FF) as u16,
        iova: Iova((cookie << 16 | u64::from(index)) << 12),
        perms: Perms::READ_WRITE,
        pages,
        index,
    }
}

fn push(host: &mut Host, cookie: u64, pages: u32) -> Result<Pushed, Broken> {
    host.push_group((0..pages).map(|index| Record::request(&page(cookie, pages, index))))
}

fn event(opaque: u64) -> Event {
    Event {
        number: 0,
        lost: 0,
        device: 2,
        pasid: None,
        opaque,
        iova: Iova(0x7000),
        perms: Perms::READ,
        reason: Reason::NotMapped,
    }
}

#[test]
fn a_guest_refuses_frames_that_are_no_channel_of_its_version() {
    let (mut frames, window) = {
        let (host, window) = open();
        (host.into_frames(), window)
    };
    assert!(Guest::open(window.clone()).is_some());

    // Word 0 is "PORTCHAN" in memory order; word 1 the version and the number of records.
    let [magic, version] = [0, 1].map(|word| frames[HEADER].load(word));
    assert_eq!((magic.to_le_bytes(), version), (*b"PORTCHAN", 64 << 32 | 1));
    for (word, value) in [(0, magic ^ 1), (1, 64 << 32 | 2), (1, 32 << 32 | 1)] {
        let good = frames[HEADER].load(word);
        frames[HEADER].store(word, value);
        assert!(Guest::open(window.clone()).is_none(), "word {word} = {value:#x}");
        frames[HEADER].store(word, good);
    }
}

#[test]
fn every_word_of_every_frame_is_written_before_a_guest_sees_it() {
    let (host, window) = open();
    let frames = host.into_frames();

    let words = |frame: usize| (0..FRAME_WORDS as usize).map(move |word| (frame, word));
    let unwritten: Vec<_> = (0..FRAMES)
        .flat_map(words)
        .filter(|&(frame, word)| guest::Frames::load(&window, frame, word) == UNWRITTEN)
        .collect();
    assert_eq!(unwritten, []);
    assert!((0..FRAME_WORDS as usize).all(|word| frames[REQUESTS].load(word) == 0));
}

#[test]
fn a_record_of_an_event_leaves_nothing_of_the_record_before_it() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    // Once around with every field in use, then again with as few as can be.
    for round in 0..2 {
        for n in 0..RECORDS {
            let full =
                Event { opaque: u64::MAX, pasid: Pasid::new(Pasid::MAX), device: u32::MAX, ..event(0) };
            let bare = Event {
                device: 0,
                opaque: 0,
                iova: Iova(0),
                perms: Perms::default(),
                reason: Reason::Other,
                ..event(0)
            };
            assert_eq!(host.push_event(if round == 0 { &full } else { &bare }), Ok(Pushed::Yes));
            assert_eq!(guest.next_event().map(|e| e.number), Some(round * RECORDS + n + 1));
        }
    }

    for place in 0..RECORDS {
        let word = |i: u64| guest::Frames::load(&window, EVENTS, (place * 8 + i) as usize);
        // Number, PASID all ones for none, kind 2; all else zero.
        let expected = [RECORDS + place + 1, 0, 0, 0xFFFF_FFFF_0000_0000, 2, 0, 0, 0];
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(word), expected);
    }
}

#[test]
fn a_group_is_seen_whole_or_not_at_all() {
    let (mut host, window) = open();
    let mut guest = guest(&window);

    for cookie in 0..4 {
        assert_eq!(push(&mut host, cookie, 15), Ok(Pushed::Yes));
    }
    // 60 records are there; 5 do not fit, 4 do.
    assert_eq!(push(&mut host, 4, 5), Ok(Pushed::Full));
    for (cookie, index) in (0..4).flat_map(|c| (0..15).map(move |i| (c, i))) {
        assert_eq!(guest.next_request(), Some(page(cookie, 15, index)));
    }
    assert_eq!(guest.next_request(), None, "nothing of the group that did not fit");

    assert_eq!(push(&mut host, 4, 5), Ok(Pushed::Yes), "now there is room");
    assert_eq!(guest.next_request(), Some(page(4, 5, 0)));
}

#[test]
fn a_ring_holds_all_its_places_and_no_more() {
    let (mut host, window) = open();
    let mut guest = guest(&window);

    for cookie in 0..RECORDS {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
    }
    assert_eq!(push(&mut host, RECORDS, 1), Ok(Pushed::Full));

    assert_eq!(guest.next_request(), Some(page(0, 1, 0)), "the oldest was not written over");
    assert_eq!(push(&mut host, RECORDS, 1), Ok(Pushed::Yes), "one place was given back");
    assert_eq!(push(&mut host, RECORDS + 1, 1), Ok(Pushed::Full));
}

#[test]
fn groups_come_out_as_they_went_in_many_times_around() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    let mut random = Random::new(6);
    let mut inside = VecDeque::new();
    let (mut cookie, mut full) = (0, 0);

    for _ in 0..20_000 {
        if random.below(2) == 0 {
            let pages = 1 + random.below(16) as u32;
            let fits = inside.len() as u64 + u64::from(pages) <= RECORDS;
            match push(&mut host, cookie, pages).expect("the guest is honest") {
                Pushed::Yes => {
                    assert!(fits);
                    inside.extend((0..pages).map(|index| page(cookie, pages, index)));
                }
                Pushed::Full => {
                    assert!(!fits);
                    full += 1;
                }
            }
            cookie += 1;
        } else {
            for _ in 0..random.below(20) {
                assert_eq!(guest.next_request(), inside.pop_front());
            }
        }
    }

    assert!(cookie > 5_000 && full > 100, "{cookie} groups, {full} times full");
}

#[test]
fn requests_and_events_do_not_take_each_others_room() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    for cookie in 0..RECORDS {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
    }

    for n in 0..RECORDS {
        assert_eq!(host.push_event(&event(n)), Ok(Pushed::Yes));
    }

    assert_eq!(guest.next_event().map(|e| e.opaque), Some(0));
    assert_eq!(guest.next_request().map(|r| r.cookie), Some(0));
}

#[test]
fn lost_events_are_counted_and_leave_a_gap_in_the_numbers() {
    let (mut host, window) = open();
    let mut guest = guest(&window);

    for n in 0..RECORDS + 3 {
        let expected = if n < RECORDS { Pushed::Yes } else { Pushed::Full };
        assert_eq!(host.push_event(&event(n)), Ok(expected));
    }
    host.count_lost_events(1);
    assert_eq!(host.events_lost(), 4);
    for n in 0..RECORDS {
        let seen = guest.next_event().expect("it was pushed");
        assert_eq!((seen.number, seen.lost, seen.opaque), (n + 1, 0, n));
    }
    assert_eq!(guest.next_event(), None);

    assert_eq!(host.push_event(&event(99)), Ok(Pushed::Yes));

    let seen = guest.next_event().expect("it was pushed");
    assert_eq!((seen.number, seen.lost), (RECORDS + 4 + 1, 4), "4 are missing, and it says so");
}

/// A guest's consumer index that no honest guest writes.
fn hostile_indices(produced: u64) -> [u64; 5] {
    [produced + 1, produced + RECORDS, u64::MAX, 1 << 63, produced.wrapping_sub(RECORDS + 1)]
}

#[test]
fn an_impossible_consumer_index_breaks_the_ring_and_nothing_is_written() {
    for which in 0..5 {
        let (mut host, window) = open();
        let produced = RECORDS + 10;
        let mut guest = guest(&window);
        for cookie in 0..produced {
            assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
            assert_eq!(host.push_event(&event(cookie)), Ok(Pushed::Yes));
            let _ = (guest.next_request(), guest.next_event());
        }
        let consumed = hostile_indices(produced)[which];
        let snapshot = |frame| {
            (0..FRAME_WORDS as usize).map(|w| guest::Frames::load(&window, frame, w)).collect::<Vec<_>>()
        };
        let before = [HEADER, REQUESTS, EVENTS].map(snapshot);

        guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, consumed);
        guest::Frames::store(&window, CONSUMER, EVENTS_WORD, consumed);

        assert_eq!(push(&mut host, 7, 1), Err(Broken { produced, consumed }));
        assert_eq!(host.push_event(&event(7)), Err(Broken { produced, consumed }));
        assert_eq!([HEADER, REQUESTS, EVENTS].map(snapshot), before, "index {consumed:#x}");
        assert_eq!(host.events_lost(), 0, "a broken ring is not a full one");
    }
}

#[test]
fn a_consumer_index_that_goes_back_within_the_ring_only_costs_the_guest_room() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    for cookie in 0..10 {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
        let _ = guest.next_request();
    }

    guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, 0);

    for cookie in 10..RECORDS {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
    }
    assert_eq!(push(&mut host, RECORDS, 1), Ok(Pushed::Full));
}

#[test]
fn a_group_without_pages_changes_nothing() {
    let (mut host, window) = open();

    assert_eq!(push(&mut host, 1, 0), Ok(Pushed::Yes));

    assert_eq!(guest(&window).next_request(), None);
}

#[test]
fn records_that_say_nothing_known_are_passed_over_one_at_a_time() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    let unknown = Record([1, 0, 0, 0, 9, 0, 0, 0]);

    assert_eq!(host.push_group([unknown, Record::request(&page(2, 1, 0))].into_iter()), Ok(Pushed::Yes));

    assert_eq!(guest.next_request(), None, "kind 9");
    assert_eq!(guest.next_request(), Some(page(2, 1, 0)));
}
