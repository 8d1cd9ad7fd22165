//! The broker in every interleaving of two or three cores, and with all that weak memory orders allow.
//!
//! The main thread of each model is the service core. Preemptions are bounded where it says so: the switches from a thread
//! that could have gone on. Each test prints how many interleavings it tried.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use loom::thread;
use std::{
    cell::Cell,
    collections::BTreeMap,
    fmt::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use under_loom::{
    Answer, AttachmentId, Broker, Cookie, DeviceId, Error, Escalation, Expiry, Group, Inbox, Ledger, Limits,
    Owner, Policy, QueueId, Requests, Settled, Verdict, Whose, spsc::Ring,
};

const DISK: StreamId = StreamId(0x20);
const DEADLINE_US: u64 = 100_000;

/// The stack of a service core.
const STACK_WORDS: usize = 1 << 19;

/// Runs `body` in every interleaving with at most so many preemptions, and says how many of them ended in what way. They
/// end in `ends` ways.
fn model(
    name: &str,
    preemptions: Option<usize>,
    ends: usize,
    body: impl Fn() -> String + Send + Sync + 'static,
) {
    let tried = Arc::new(Mutex::new(BTreeMap::new()));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 100_000;
    let body = Arc::new(body);
    for gives_way in [false, true] {
        GIVES_WAY.set(gives_way);
        let (count, body) = (Arc::clone(&tried), Arc::clone(&body));
        builder.check(move || {
            let body = Arc::clone(&body);
            // The first thread of a model has a small stack, and a broker is large before it lies on the heap.
            let service = thread::Builder::new().stack_size(STACK_WORDS).spawn(move || body());
            let end = service.expect("it starts").join().expect("it ends");
            *count.lock().expect("no other thread has it").entry(end).or_insert(0) += 1;
        });
    }
    let tried: BTreeMap<String, usize> = tried.lock().expect("no other thread has it").clone();
    let bound = preemptions.map_or("any number of".into(), |bound| format!("up to {bound}"));
    println!("{name}: {} interleavings, {bound} preemptions: {tried:?}", tried.values().sum::<usize>());
    assert_eq!(tried.len(), ends);
}

thread_local! {
    /// Whether `give_way` does so. All threads of a model are one of the machine's.
    static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
}

/// Lets loom begin with another thread as well, in one of two runs.
///
/// Of a word that one thread loads, and another loads and then changes, loom would not try that change before the first
/// one's load: it remembers the last access alone. But whoever has given way is not shown again what it had seen before:
/// that a weak memory order may let it see old values is tried in the run without.
fn give_way() {
    if GIVES_WAY.get() {
        thread::yield_now();
    }
}

/// Takes what is written, and forgets it.
struct Nowhere;

impl Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

/// What the cores share: one queue of `S` slots, and one device with groups of one or two pages.
struct Shared<const S: usize> {
    ledger: Ledger<1, S, 8, 8>,
    ring: Ring,
    queue: QueueId,
    device: DeviceId,
    attachment: AttachmentId,
    /// How often each group was answered, and shown, by its number. No core acts on it.
    answered: [AtomicUsize; 128],
    shown: [AtomicUsize; 128],
}

impl<const S: usize> Shared<S> {
    fn new() -> Arc<Self> {
        let ledger = Ledger::new(1024);
        write!(Nowhere, "{ledger:?}").expect("nowhere has room");
        let queue = ledger.open(Owner::Pager).expect("there is one");
        let escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };
        let limits = Limits { escalation, ..Limits::with_requests(128) };
        let device = ledger.add_device(DISK, &limits).expect("there is room");
        let policy = Policy { stream: DISK, requests: Requests::Any, device, queue, name: 1, opaque: 7 };
        let attachment = ledger.attach(&policy).expect("there is room");
        let (answered, shown) = ([const { AtomicUsize::new(0) }; 128], [const { AtomicUsize::new(0) }; 128]);
        Arc::new(Self { ledger, ring: Ring::default(), queue, device, attachment, answered, shown })
    }

    fn broker<const N: usize>(&self) -> Broker<'_, 1, S, 8, 8, N> {
        let mut broker = Broker::new(&self.ledger);
        broker.connect(0, self.ring.producer()).expect("it is large enough");
        broker
    }

    /// Reads what was announced, as the core of the queue's owner; returns the last cookie.
    fn read(&self) -> Option<Cookie> {
        let mut inbox = Inbox::new(&self.ledger, 0, self.ring.consumer());
        let groups = std::iter::from_fn(|| inbox.next(0));
        groups.inspect(|group| self.show(group)).last().map(|group| group.cookie)
    }

    /// A group that is shown is one group, and whole.
    fn show(&self, group: &Group) {
        let number = group.tag.index;
        assert_eq!(group.pages.len(), pages(number), "{group:?}");
        assert!(group.pages.iter().all(|page| page.iova().0 >> 12 == u64::from(number)), "{group:?}");
        assert_eq!((group.name, group.opaque, group.tag.pasid), (1, 7, Pasid::new(number.into())));
        assert_eq!(self.shown[usize::from(number)].fetch_add(1, SeqCst), 0, "{number} was shown twice");
    }

    fn settle(&self, cookie: Cookie) {
        match self.ledger.settle(self.queue, cookie, Outcome::Success, 0) {
            Ok(Settled::Now(answer)) => self.send(answer),
            Ok(Settled::Held) | Err(_) => {}
        }
    }

    fn evict(&self, whose: Whose) {
        while let Some(answer) = self.ledger.evict(self.queue, whose, 0) {
            self.send(answer);
        }
    }

    fn send(&self, answer: Answer<'_, S>) {
        let sent = answer.send(|response| {
            self.count(&response);
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok());
    }

    fn count(&self, response: &PageResponse) {
        assert_eq!(response.tag.pasid, Pasid::new(response.tag.index.into()));
        self.answered[usize::from(response.tag.index)].fetch_add(1, SeqCst);
    }

    /// All that began is answered, each group of `numbers` once, and all slots are free. Returns who answered.
    fn check(&self, numbers: impl Iterator<Item = usize>) -> String {
        for number in numbers {
            assert_eq!(self.answered[number].load(SeqCst), 1, "group {number}");
        }
        assert_eq!(self.ledger.outstanding(self.queue), 0);
        assert_eq!(self.ledger.outstanding_requests(self.device), 0);
        let tally = self.ledger.tally(self.device).expect("it is there");
        assert_eq!((tally.opened, tally.discarded), (tally.answered(), 0), "{tally:?}");
        let counts = [
            (tally.succeeded, "settled"),
            (tally.expired, "expired"),
            (tally.evicted, "evicted"),
            (tally.refused, "refused"),
            (tally.held, "held"),
        ];
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        counts.map(|(count, name)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    }
}

/// Pages of a group.
fn pages(number: u16) -> usize {
    1 + usize::from(number) % 2
}

/// The service core takes in a group, whose pages and PASID all carry its number. Returns whether it waits.
fn admit<const S: usize, const N: usize>(
    shared: &Shared<S>,
    broker: &mut Broker<'_, 1, S, 8, 8, N>,
    number: u16,
) -> bool {
    let tag = GroupTag { pasid: Pasid::new(number.into()), index: number };
    let iova = Iova(u64::from(number) << 12);
    for page in 1..=pages(number) {
        let last = page == pages(number);
        match broker.admit(&PageRequest { stream: DISK, tag, iova, perms: Perms::READ, last }, 0) {
            Verdict::Forward { queue: 0 } => return true,
            Verdict::Refuse(response) => shared.count(&response),
            Verdict::End(answer) => shared.send(answer),
            Verdict::Nothing if !last => {}
            other => panic!("{other:?}"),
        }
    }
    false
}

/// The service core ends what is due.
fn expire<const S: usize, const N: usize>(
    shared: &Shared<S>,
    broker: &mut Broker<'_, 1, S, 8, 8, N>,
    now_us: u64,
) {
    loop {
        match broker.expire(now_us) {
            Expiry::Expired { answer, .. } | Expiry::Held(answer) => shared.send(answer),
            Expiry::Nothing => {}
            Expiry::Done => return,
        }
    }
}

#[test]
fn a_group_that_is_settled_evicted_and_expires_at_once_is_answered_once() {
    model("settle, evict, expire", None, 3, || {
        let shared = Shared::<1>::new();
        let mut broker = shared.broker::<17>();
        assert!(admit(&shared, &mut broker, 1));
        let cookie = shared.read().expect("it waits");

        let (guest, control) = (Arc::clone(&shared), Arc::clone(&shared));
        let guest = thread::spawn(move || guest.settle(cookie));
        let control = thread::spawn(move || control.evict(Whose::Attachment(control.attachment)));
        give_way();
        expire(&shared, &mut broker, DEADLINE_US + 2_000);
        guest.join().expect("it ends");
        control.join().expect("it ends");

        shared.check(1..2)
    });
}

/// The groups of the numbers `first` wait, and `then` is admitted, while the owner's core reads and the control path evicts.
fn announced(first: &[u16], then: u16) -> String {
    let shared = Shared::<1>::new();
    let mut broker = shared.broker::<17>();
    for &number in first {
        assert!(admit(&shared, &mut broker, number));
    }

    let (home, control) = (Arc::clone(&shared), Arc::clone(&shared));
    let home = thread::spawn(move || {
        home.read();
    });
    let control = thread::spawn(move || control.evict(Whose::All));
    give_way();
    let waits = admit(&shared, &mut broker, then);
    home.join().expect("it ends");
    control.join().expect("it ends");

    // What still waits was shown, or is announced.
    let _ = shared.read();
    let still = waits && shared.answered[usize::from(then)].load(SeqCst) == 0;
    assert!(!still || shared.shown[usize::from(then)].load(SeqCst) == 1, "its announcement was lost");
    shared.evict(Whose::All);
    let shown = shared.shown.iter().filter(|shown| shown.load(SeqCst) == 1).count();
    let all = first.iter().chain([&then]);
    format!("{}, {shown} shown", shared.check(all.map(|&number| usize::from(number))))
}

#[test]
fn a_group_is_shown_whole_or_ended_and_its_announcement_is_not_lost() {
    model("admit, next, evict", Some(3), 2, || announced(&[], 0));
}

#[test]
fn a_slot_that_is_used_again_on_the_way_to_its_owner_shows_one_group_and_is_announced() {
    model("admit again, next, evict", Some(3), 5, || announced(&[0], 1));
}

#[test]
fn a_slot_that_a_group_of_one_request_uses_again_shows_one_group_and_is_announced() {
    model("admit one request again, next, evict", Some(3), 5, || announced(&[0], 2));
}

#[test]
fn a_slot_that_is_freed_is_taken_once_and_none_is_lost() {
    model("admit twice, settle, settle", Some(2), 3, || {
        let shared = Shared::<2>::new();
        let mut broker = shared.broker::<18>();
        assert!(admit(&shared, &mut broker, 2));
        let first = shared.read().expect("it waits");
        assert!(admit(&shared, &mut broker, 4));
        let second = shared.read().expect("it waits");

        let (one, other) = (Arc::clone(&shared), Arc::clone(&shared));
        let one = thread::spawn(move || one.settle(first));
        let other = thread::spawn(move || other.settle(second));
        give_way();
        admit(&shared, &mut broker, 6);
        admit(&shared, &mut broker, 8);
        one.join().expect("it ends");
        other.join().expect("it ends");

        // Both slots can be had, and no third.
        shared.evict(Whose::All);
        assert!(admit(&shared, &mut broker, 10) && admit(&shared, &mut broker, 12));
        assert!(!admit(&shared, &mut broker, 14), "it is refused");
        shared.evict(Whose::All);
        shared.check([2, 4, 6, 8, 10, 12, 14].into_iter())
    });
}

#[test]
fn a_slot_of_another_word_is_found_while_one_is_freed_and_taken() {
    model("65 slots: admit three times, settle", Some(2), 2, || {
        let shared = Shared::<65>::new();
        let mut broker = shared.broker::<81>();
        let cookies: Vec<_> = (0..63)
            .map(|number| {
                assert!(admit(&shared, &mut broker, 2 * number));
                shared.read().expect("it waits")
            })
            .collect();

        let (guest, cookie) = (Arc::clone(&shared), cookies[5]);
        let guest = thread::spawn(move || guest.settle(cookie));
        give_way();
        // Two slots are free, in two words, and perhaps a third.
        assert!(admit(&shared, &mut broker, 1));
        assert!(admit(&shared, &mut broker, 3));
        let waits = admit(&shared, &mut broker, 5);
        guest.join().expect("it ends");
        assert_eq!(shared.answered[10].load(SeqCst), 1);
        // Four groups came for the three slots.
        assert_eq!(admit(&shared, &mut broker, 7), !waits, "a free slot is found");
        format!("{waits}")
    });
}

#[test]
fn a_cookie_of_an_earlier_group_in_the_same_slot_answers_nothing() {
    model("settle twice, evict and admit", Some(3), 3, || {
        let shared = Shared::<1>::new();
        let mut broker = shared.broker::<17>();
        assert!(admit(&shared, &mut broker, 2));
        let cookie = shared.read().expect("it waits");

        let guest = Arc::clone(&shared);
        let guest = thread::spawn(move || {
            guest.settle(cookie);
            guest.settle(cookie);
        });
        give_way();
        shared.evict(Whose::All);
        let waits = admit(&shared, &mut broker, 4);
        guest.join().expect("it ends");

        assert_eq!(shared.answered[4].load(SeqCst), usize::from(!waits), "nobody answered it");
        shared.evict(Whose::All);
        let (by, waits) = (shared.check([2, 4].into_iter()), if waits { "waited" } else { "found no room" });
        format!("{by}, the second {waits}")
    });
}

#[test]
fn an_attachment_is_found_as_it_was_or_as_it_is() {
    model("find, detach and attach", Some(3), 3, || {
        let shared = Shared::<1>::new();
        let control = Arc::clone(&shared);
        let control = thread::spawn(move || {
            let Shared { ledger, attachment, device, queue, .. } = &*control;
            ledger.leave(*attachment);
            ledger.detach(*attachment);
            let policy = Policy {
                stream: DISK,
                requests: Requests::Any,
                device: *device,
                queue: *queue,
                name: 2,
                opaque: 14,
            };
            assert!(ledger.attach(&policy).is_ok());
        });

        give_way();
        let found = shared.ledger.owner_of(DISK, None);
        assert!([None, Some((0, 1, 7)), Some((0, 2, 14))].contains(&found), "{found:?}");
        control.join().expect("it ends");
        assert_eq!(shared.ledger.owner_of(DISK, None), Some((0, 2, 14)));
        format!("{found:?}")
    });
}

#[test]
fn two_cores_that_attach_at_once_get_two_places() {
    model("attach, attach, find", Some(2), 2, || {
        let shared = Shared::<1>::new();
        let attach = |shared: &Shared<1>, name: u32| {
            let Shared { ledger, device, queue, .. } = shared;
            let requests = Requests::Of(Pasid::new(name).expect("it has 20 bits"));
            let opaque = name.into();
            let policy = Policy { stream: DISK, requests, device: *device, queue: *queue, name, opaque };
            ledger.attach(&policy)
        };
        let others = [2, 3].map(|name| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || attach(&shared, name).expect("there is room"))
        });
        give_way();
        let found = shared.ledger.owner_of(DISK, Pasid::new(2));
        assert!([Some((0, 1, 7)), Some((0, 2, 2))].contains(&found), "{found:?}");

        let ids = others.map(|other| other.join().expect("it ends"));
        assert_ne!(ids[0], ids[1]);
        for name in [2, 3] {
            let found = shared.ledger.owner_of(DISK, Pasid::new(name));
            assert_eq!(found, Some((0, name, name.into())));
        }
        assert_eq!(attach(&shared, 3), Err(Error::NoRoomForAttachment));
        format!("{found:?}")
    });
}

#[test]
fn a_number_that_is_used_twice_is_answered_once_or_once_for_each() {
    model("duplicate, settle, evict", Some(2), 3, || {
        let shared = Shared::<2>::new();
        let mut broker = shared.broker::<18>();
        assert!(admit(&shared, &mut broker, 2));
        let cookie = shared.read().expect("it waits");

        let (guest, control) = (Arc::clone(&shared), Arc::clone(&shared));
        let guest = thread::spawn(move || guest.settle(cookie));
        let control = thread::spawn(move || control.evict(Whose::Device(control.device)));
        give_way();
        let is_new = admit(&shared, &mut broker, 2);
        guest.join().expect("it ends");
        control.join().expect("it ends");
        shared.evict(Whose::All);

        // One answer for both, unless the first group had its own already.
        assert_eq!(shared.answered[2].load(SeqCst), 1 + usize::from(is_new));
        shared.check(0..0)
    });
}

#[test]
fn an_answer_that_is_held_back_is_sent_once() {
    model("settle held, expire, evict", Some(3), 3, || {
        let shared = Shared::<1>::new();
        let mut broker = shared.broker::<17>();
        // The guest claims twice to have repaired a page that it is asked for again, and is not believed any more.
        for round in 1..=2 {
            assert!(admit(&shared, &mut broker, 2));
            shared.settle(shared.read().expect("it waits"));
            shared.shown[2].store(0, SeqCst);
            assert_eq!(shared.answered[2].swap(0, SeqCst), 1, "in round {round}");
        }
        assert!(admit(&shared, &mut broker, 2));
        let cookie = shared.read().expect("it waits");

        let (guest, control) = (Arc::clone(&shared), Arc::clone(&shared));
        let guest = thread::spawn(move || guest.settle(cookie));
        let control = thread::spawn(move || control.evict(Whose::All));
        give_way();
        expire(&shared, &mut broker, 4_000);
        guest.join().expect("it ends");
        control.join().expect("it ends");
        expire(&shared, &mut broker, DEADLINE_US + 2_000);

        shared.check(2..3)
    });
}
