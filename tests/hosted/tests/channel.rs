//! The fault channel: the hypervisor's side and a guest's side over the same four frames.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use channel::{
    Record,
    guest::{self, Guest},
    host::{Broken, Host, Pushed},
    record::{Event, Reason, Request},
    ring::{CONSUMER, EVENTS, EVENTS_WORD, FRAMES, HEADER, RECORDS, REQUESTS, REQUESTS_WORD},
};
use hosted::{Ends, Random, Window};
use iommu::{Iova, Pasid, Perms};
use models::memory::{Memory, UNWRITTEN};
use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

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
    let mut frames = host.into_frames();
    for frame in &mut frames {
        (0..FRAME_WORDS as usize).for_each(|word| frame.store(word, UNWRITTEN));
    }

    let _host = Host::new(frames);

    for (frame, word) in (0..FRAMES).flat_map(|frame| (0..FRAME_WORDS as usize).map(move |w| (frame, w))) {
        let expected = match (frame, word) {
            // "PORTCHAN", the first letter in the lowest byte; 64 records, version 1.
            (0, 0) => 0x4E41_4843_5452_4F50,
            (0, 1) => 0x0000_0040_0000_0001,
            _ => 0,
        };
        assert_eq!(guest::Frames::load(&window, frame, word), expected, "frame {frame}, word {word}");
    }
}

#[test]
fn indices_and_sums_lie_in_the_header_and_the_consumer_frame_as_documented() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    assert_eq!(push(&mut host, 1, 3), Ok(Pushed::Yes));
    for n in 0..5 {
        assert_eq!(host.push_event(&event(n)), Ok(Pushed::Yes));
    }
    host.count_lost_requests(0x11);
    host.count_lost_events(0x22);
    assert!(guest.next_request().is_some());
    let _ = (guest.next_event(), guest.next_event());

    let words = |frame| [2, 3, 4, 5, 6].map(|word| guest::Frames::load(&window, frame, word));
    assert_eq!(words(0), [3, 5, 0x11, 0x22, 0]);
    assert_eq!(words(3), [1, 2, 0, 0, 0]);
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
fn nothing_of_a_group_is_admitted_before_all_of_it_is_written() {
    let (mut host, window) = open();
    let produced = || guest::Frames::load(&window, HEADER, REQUESTS_WORD);
    assert_eq!(push(&mut host, 1, 2), Ok(Pushed::Yes));

    let mut seen = Vec::new();
    let records = (0..5).map(|index| {
        seen.push(produced());
        Record::request(&page(2, 5, index))
    });
    assert_eq!(host.push_group(records), Ok(Pushed::Yes));

    assert_eq!((seen, produced()), (vec![2; 5], 7));
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
                other => panic!("{other:?}"),
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

#[test]
fn an_event_that_is_offered_is_shown_once_there_is_room_and_not_lost_before() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    for n in 0..RECORDS {
        assert_eq!(host.offer_event(&event(n)), Ok(Pushed::Yes));
    }
    let before = snapshot(&window);

    (0..3).for_each(|_| assert_eq!(host.offer_event(&event(99)), Ok(Pushed::Full)));
    assert_eq!((snapshot(&window), host.events_lost()), (before, 0));
    assert!(guest.next_event().is_some());
    assert_eq!(host.offer_event(&event(99)), Ok(Pushed::Yes));

    let last = std::iter::from_fn(|| guest.next_event()).last().expect("they are there");
    assert_eq!((last.number, last.lost, last.opaque), (RECORDS + 1, 0, 99));
}

#[test]
fn events_that_are_lost_last_are_seen_without_another_event() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    assert_eq!((guest.events_lost(), guest.requests_lost()), (0, 0));
    for n in 0..RECORDS + 2 {
        let _ = host.push_event(&event(n));
    }
    assert_eq!(guest.events_lost(), 2, "those that found no room");
    host.count_lost_events(3);

    let last = core::iter::from_fn(|| guest.next_event()).last().expect("there were some");

    assert_eq!((last.number, last.lost, guest.events_lost()), (RECORDS, 0, 5));
    // Header, word 5.
    assert_eq!(guest::Frames::load(&window, 0, 5), 5);
}

#[test]
fn requests_that_a_guest_is_never_shown_are_counted_where_it_sees_them() {
    let (mut host, window) = open();
    let guest = guest(&window);

    host.count_lost_requests(2);
    host.count_lost_requests(5);

    assert_eq!((guest.requests_lost(), guest.events_lost(), host.events_lost()), (7, 0, 0));
    // Header, word 4.
    assert_eq!(guest::Frames::load(&window, 0, 4), 7);
}

#[test]
fn indices_and_numbers_go_on_where_they_wrap() {
    let first = u64::MAX - 100;
    let (host, window) = open();
    let mut host = Host::counting_from(first, host.into_frames());
    let mut guest = guest(&window);
    host.count_lost_events(u64::MAX - 200);
    let mut seen = 0_u64;

    for n in 0..400_u64 {
        assert_eq!(push(&mut host, n, 1), Ok(Pushed::Yes));
        assert_eq!(guest.next_request(), Some(page(n, 1, 0)));
        let expected = if n % 3 == 0 { Pushed::Full } else { Pushed::Yes };
        if expected == Pushed::Full {
            // As an event that found no room.
            host.count_lost_events(1);
        } else {
            assert_eq!(host.push_event(&event(n)), Ok(expected));
            seen += 1;
            let read = guest.next_event().expect("it was pushed");
            let happened = first.wrapping_add(u64::MAX - 200).wrapping_add(n + 1);
            assert_eq!((read.opaque, read.number), (n, happened));
            assert_eq!(read.number, first.wrapping_add(seen).wrapping_add(read.lost));
        }
    }

    // 401 places after u64::MAX - 100 is 299; two thirds of the events found room.
    assert_eq!(guest::Frames::load(&window, HEADER, REQUESTS_WORD), 299);
    assert_eq!(guest::Frames::load(&window, HEADER, EVENTS_WORD), first.wrapping_add(seen));
    assert_eq!(guest.events_lost(), (u64::MAX - 200).wrapping_add(134));
}

#[test]
fn a_full_ring_is_full_where_indices_wrap_too() {
    let (host, window) = open();
    let mut host = Host::counting_from(u64::MAX - 10, host.into_frames());
    let mut guest = guest(&window);

    for cookie in 0..RECORDS {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
    }
    assert_eq!(push(&mut host, RECORDS, 1), Ok(Pushed::Full));
    for cookie in 0..RECORDS {
        assert_eq!(guest.next_request(), Some(page(cookie, 1, 0)));
    }
    assert_eq!(guest.next_request(), None);
    assert_eq!(push(&mut host, RECORDS, 1), Ok(Pushed::Yes));
}

#[test]
fn a_guest_that_opens_the_channel_again_goes_on_where_it_was() {
    let (mut host, window) = open();
    for cookie in 0..5 {
        assert_eq!(push(&mut host, cookie, 1), Ok(Pushed::Yes));
    }
    let mut first = guest(&window);
    let _ = (first.next_request(), first.next_request());

    let mut second = guest(&window);

    assert_eq!(second.next_request(), Some(page(2, 1, 0)));
    assert_eq!(push(&mut host, 5, 1), Ok(Pushed::Yes));
}

/// What the guest sees of the frames that it cannot write.
fn snapshot(window: &Window) -> Vec<u64> {
    [HEADER, REQUESTS, EVENTS]
        .iter()
        .flat_map(|&frame| (0..FRAME_WORDS as usize).map(move |word| (frame, word)))
        .map(|(frame, word)| guest::Frames::load(window, frame, word))
        .collect()
}

/// Opens a channel, passes `produced` records through each ring, and leaves `unread` of them.
fn used(produced: u64, unread: u64) -> (Host, Window) {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    for n in 0..produced {
        assert_eq!(push(&mut host, n, 1), Ok(Pushed::Yes));
        assert_eq!(host.push_event(&event(n)), Ok(Pushed::Yes));
        if n >= unread {
            assert!(guest.next_request().is_some() && guest.next_event().is_some());
        }
    }
    // So that the host has seen how far the guest is.
    assert_eq!(push(&mut host, 0, 0), Ok(Pushed::Yes));
    (host, window)
}

#[test]
fn an_impossible_consumer_index_ends_the_channel_once_and_nothing_is_written() {
    let (produced, unread) = (RECORDS + 10, 20);
    let read = produced - unread;
    // Ahead, by one and by much; behind what it said before, by one, by a ring and by more; wrapped.
    let ahead = [produced + 1, produced + RECORDS, 1 << 63, u64::MAX];
    let behind = [read - 2, produced - RECORDS, produced - RECORDS - 1, 0];
    for consumed in ahead.into_iter().chain(behind) {
        let (mut host, window) = used(produced, unread);
        let before = snapshot(&window);

        guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, consumed);
        assert_eq!(push(&mut host, 7, 1), Err(Broken { produced, consumed }), "index {consumed:#x}");

        // Once, and whatever the guest writes afterwards; the other ring ends with it.
        guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, produced);
        assert_eq!(push(&mut host, 7, 1), Ok(Pushed::Ended));
        assert_eq!(push(&mut host, 7, 0), Ok(Pushed::Ended));
        assert_eq!(host.push_event(&event(7)), Ok(Pushed::Ended));
        assert_eq!(snapshot(&window), before, "index {consumed:#x}");

        let (mut host, window) = used(produced, unread);
        guest::Frames::store(&window, CONSUMER, EVENTS_WORD, consumed);
        // The host last looked when it made the last event, and the guest had not read that one and the one before.
        assert_eq!(host.push_event(&event(7)), Err(Broken { produced, consumed }), "index {consumed:#x}");
        assert_eq!(host.push_event(&event(7)), Ok(Pushed::Ended));
        assert_eq!(push(&mut host, 7, 1), Ok(Pushed::Ended));
        assert_eq!(snapshot(&window), before, "index {consumed:#x}");
        assert_eq!(host.events_lost(), 0, "a broken ring is not a full one");
    }
}

#[test]
fn any_index_at_all_is_either_a_possible_one_or_the_end() {
    let mut random = Random::new(9);
    let (mut ends, mut goes_on) = (0, 0);
    for round in 0..300 {
        let first = if round % 2 == 0 { 0 } else { u64::MAX - 40 };
        let (host, window) = open();
        let mut host = Host::counting_from(first, host.into_frames());
        // What the host knows: produced, and consumed when it last looked.
        let (mut produced, mut consumed) = (first, first);
        for n in 0..60 {
            let claimed = match random.below(12) {
                0 => random.number(),
                1 => produced.wrapping_add(1 + random.below(3)),
                2 => consumed.wrapping_sub(1 + random.below(RECORDS)),
                // Most of the time the guest reads on, or does nothing.
                _ => consumed.wrapping_add(random.below(produced.wrapping_sub(consumed).wrapping_add(1))),
            };
            let possible = claimed.wrapping_sub(consumed) <= produced.wrapping_sub(consumed);
            guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, claimed);
            let before = snapshot(&window);
            let pages = random.below(17) as u32;
            let unread = produced.wrapping_sub(claimed);

            let pushed = push(&mut host, n, pages);

            if !possible {
                assert_eq!(pushed, Err(Broken { produced, consumed: claimed }));
                assert_eq!(push(&mut host, n, pages), Ok(Pushed::Ended));
                assert_eq!(snapshot(&window), before);
                ends += 1;
                break;
            }
            consumed = claimed;
            goes_on += 1;
            if unread + u64::from(pages) > RECORDS {
                assert_eq!(pushed, Ok(Pushed::Full));
                assert_eq!(snapshot(&window), before);
            } else {
                assert_eq!(pushed, Ok(Pushed::Yes));
                produced = produced.wrapping_add(u64::from(pages));
                assert_eq!(guest::Frames::load(&window, HEADER, REQUESTS_WORD), produced);
            }
        }
    }
    assert!(ends > 200 && goes_on > 600, "{ends} ends, {goes_on} pushes");
}

#[test]
fn an_index_that_changes_all_the_time_is_believed_once_or_not_at_all() {
    const TIMES: u64 = 300;
    let (host, window) = open();
    let mut frames = host.into_frames();
    let over = AtomicBool::new(false);
    let mut broken = 0;

    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        scope.spawn(|| {
            // Possible, and not, by turns: what the host checks and what it uses must be one and the same.
            while !over.load(Relaxed) {
                guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, 0);
                guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, RECORDS + 1);
            }
        });
        while broken < TIMES {
            let mut host = Host::new(frames);
            // Once it is full, one more record would be written over one that was not read.
            let mut pushed = push(&mut host, broken, RECORDS as u32);
            for _ in 0..20 {
                let Ok(Pushed::Yes | Pushed::Full) = pushed else { break };
                let produced = guest::Frames::load(&window, HEADER, REQUESTS_WORD);
                assert_eq!(produced, RECORDS, "the guest has read none");
                pushed = push(&mut host, broken, 1);
            }
            if let Err(Broken { consumed, .. }) = pushed {
                assert_eq!(consumed, RECORDS + 1);
                broken += 1;
            }
            frames = host.into_frames();
        }
    });
}

#[test]
fn a_group_that_can_never_fit_is_told_from_one_that_does_not_fit_now() {
    let (mut host, window) = open();

    assert_eq!(push(&mut host, 1, RECORDS as u32), Ok(Pushed::Yes), "as many as there are places");
    assert_eq!(push(&mut host, 2, RECORDS as u32), Ok(Pushed::Full));
    let before = snapshot(&window);
    assert_eq!(push(&mut host, 3, RECORDS as u32 + 1), Ok(Pushed::TooLarge));
    assert_eq!(push(&mut host, 3, u32::MAX), Ok(Pushed::TooLarge));
    assert_eq!(snapshot(&window), before);
}

/// Says that it has one record, and has as many as it says it has not.
struct Liar(u64);

impl Iterator for Liar {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        self.0 = self.0.checked_sub(1)?;
        Some(Record::request(&page(self.0, 1, 0)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (2, Some(2))
    }
}

impl ExactSizeIterator for Liar {}

#[test]
fn a_group_that_is_wrong_about_its_length_shows_nothing_that_was_not_written() {
    for (has, shown) in [(0, 0), (1, 1), (2, 2), (200, 2)] {
        let (mut host, window) = open();
        assert_eq!(host.push_group(Liar(has)), Ok(Pushed::Yes));
        assert_eq!(guest::Frames::load(&window, HEADER, REQUESTS_WORD), shown, "it has {has}");
        assert!((2 * 8..512).all(|word| guest::Frames::load(&window, REQUESTS, word) == 0));
    }
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

#[test]
fn the_groups_of_a_batch_become_visible_together_and_only_those_that_were_accepted() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    let mut batch = host.requests().expect("the guest keeps to the rules");
    let record = |cookie, pages| move |index| Record::request(&page(cookie, pages, index as u32));

    assert!(batch.is_empty());
    assert!(batch.offer(1, record(1, 1)));
    batch.accept();
    // Answered while it was read: its place is the next one's.
    assert!(batch.offer(3, record(2, 3)));
    assert!(batch.offer(1, record(5, 1)));
    batch.accept();
    assert!(batch.offer(1, record(2, 3)));
    assert!(batch.offer(2, record(3, 2)));
    batch.accept();
    batch.accept();
    assert!(batch.offer(1, record(4, 1)));
    assert!(!batch.is_empty());
    assert_eq!(guest.next_request(), None, "the batch is not over");
    drop(batch);

    assert_eq!(guest::Frames::load(&window, HEADER, REQUESTS_WORD), 4);
    let shown: Vec<_> = core::iter::from_fn(|| guest.next_request()).collect();
    assert_eq!(shown, [page(1, 1, 0), page(5, 1, 0), page(3, 2, 0), page(3, 2, 1)]);
}

#[test]
fn a_batch_has_the_room_that_the_guest_had_made_when_it_began() {
    let (mut host, window) = open();
    let mut guest = guest(&window);
    let record = |index| Record::request(&page(7, 2, index as u32));
    for rest in [RECORDS as usize, 1, 2] {
        let mut batch = host.requests().expect("the guest keeps to the rules");
        for _ in 0..rest {
            assert!(!batch.offer(rest + 1, record), "more than there is room for");
            assert!(batch.offer(1, record));
            batch.accept();
        }
        assert!(!batch.offer(1, record), "it is full");
        // Nothing is visible in the first round.
        assert_eq!(guest.next_request().is_some(), rest < 64);
        assert!(!batch.offer(1, record), "what is read meanwhile counts for the next one");
        drop(batch);
        assert!(guest.next_request().is_some());
    }
}

#[test]
fn a_batch_of_a_channel_that_has_ended_has_no_room_and_shows_nothing() {
    let (mut host, window) = open();
    guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, 1);

    assert_eq!(host.requests().map(|_| ()), Err(Broken { produced: 0, consumed: 1 }));
    guest::Frames::store(&window, CONSUMER, REQUESTS_WORD, 0);
    let mut batch = host.requests().expect("it was told once");
    assert!(!batch.offer(1, |_| Record::request(&page(1, 1, 0))));
    batch.accept();
    drop(batch);
    assert_eq!(guest::Frames::load(&window, HEADER, REQUESTS_WORD), 0);
}
