//! The broker under long random walks: devices that obey no rule, guests that answer what they like, things
//! that come and go. What is checked is what a device sees: each group that it ended is answered once, and
//! never later.
//!
//! Ten million operations by default, a million forged cookies; more on request, with their progress:
//! `PORTCULLIS_SOAK=1000000000 cargo test -p hosted --test broker_soak --release -- --nocapture`. The walk is
//! the same in every run, and another one with another `PORTCULLIS_SEED`.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    AttachmentId, Cookie, DeviceId, Escalation, FaultLimits, Limits, Owner, POISONED, Policy, Requests,
    Tally, Whose,
};
use hosted::{
    Random,
    rig::{Did, Ended, Rig, last},
};
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, StreamId};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("it is a number"))
}

/// Group numbers of a device, for each of its PASIDs.
const INDICES: usize = 6;
/// PASIDs that a device may use: none, 5 and 6.
const PASIDS: [Option<u32>; 3] = [None, Some(5), Some(6)];
const NUMBERS: usize = INDICES * PASIDS.len();

/// What a device knows of one of its group numbers.
#[derive(Clone, Copy, Default)]
struct Number {
    /// It sent a last request, and has no answer.
    waits: bool,
    /// It used the number again meanwhile.
    is_doubled: bool,
    /// What the guest was told, while it waits.
    cookie: Option<Cookie>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Attached {
    No,
    To(usize, AttachmentId),
    Leaving(usize, AttachmentId),
}

struct Device {
    stream: StreamId,
    id: DeviceId,
    limits: Limits,
    requests: Requests,
    attached: Attached,
    /// How often it was attached.
    serial: u64,
    is_quiesced: bool,
    numbers: [Number; NUMBERS],
    waiting: u64,
    /// Answers that are to be in its counts.
    answers: u64,
}

/// A cookie that some guest was told once.
#[derive(Clone, Copy)]
struct Told {
    queue: usize,
    device: usize,
    number: usize,
    cookie: Cookie,
}

struct Walk<const Q: usize, const S: usize, const N: usize> {
    rig: Rig<Q, S, N>,
    random: Random,
    devices: Vec<Device>,
    is_shut: [bool; Q],
    /// The last cookies that were told, oldest first as a ring.
    told: Vec<Told>,
    next_told: usize,
    now_us: u64,
    forged: u64,
    late: u64,
}

fn stream(device: usize) -> StreamId {
    StreamId(8 * device as u32)
}

fn tag(number: usize) -> GroupTag {
    GroupTag { pasid: PASIDS[number / INDICES].and_then(Pasid::new), index: (number % INDICES) as u16 }
}

/// Limits of every kind: each device is special in one of them.
fn limits(device: usize, random: &mut Random) -> Limits {
    let mut pick = |values: &[u32]| values[random.below(values.len() as u64) as usize];
    let usual = Limits {
        requests: pick(&[2, 5, 16, 40]),
        deadline_us: pick(&[2_000, 20_000, 100_000]).into(),
        per_second: 0,
        burst: 1,
        half_seen: 40,
        escalation: Escalation { warn: 1, throttle: 0, requests_off: 0, block: 0 },
        faults: FaultLimits::NONE,
    };
    match device % 8 {
        3 => Limits { per_second: 10_000, burst: pick(&[1, 8]), ..usual },
        4 => Limits { half_seen: pick(&[0, 1, 3]), ..usual },
        5 => Limits { requests: 1, ..usual },
        6 => Limits { escalation: Escalation { warn: 1, throttle: 2, requests_off: 9, block: 20 }, ..usual },
        7 => Limits { deadline_us: pick(&[0, 1]).into(), ..usual },
        _ => usual,
    }
}

impl<const Q: usize, const S: usize, const N: usize> Walk<Q, S, N> {
    fn new(devices: usize, seed: u64) -> Self {
        let rig = Rig::new();
        let mut random = Random::new(seed);
        let devices = (0..devices)
            .map(|at| {
                let limits = limits(at, &mut random);
                let requests = [Requests::Plain, Requests::from(Pasid::new(5)), Requests::Any][at % 3];
                Device {
                    stream: stream(at),
                    id: rig.add(stream(at), &limits),
                    limits,
                    requests,
                    attached: Attached::No,
                    serial: 0,
                    is_quiesced: false,
                    numbers: [Number::default(); NUMBERS],
                    waiting: 0,
                    answers: 0,
                }
            })
            .collect();
        // The clock wraps on the way.
        let now_us = u64::MAX - 5_000_000;
        Self {
            rig,
            random,
            devices,
            is_shut: [false; Q],
            told: Vec::new(),
            next_told: 0,
            now_us,
            forged: 0,
            late: 0,
        }
    }

    /// Hardware tells a device an answer.
    fn take(&mut self, response: &PageResponse) {
        let at = (response.stream.0 / 8) as usize;
        let pasid = PASIDS.iter().position(|&pasid| pasid == response.tag.pasid.map(Pasid::value));
        let number = pasid.expect("it has three") * INDICES + usize::from(response.tag.index);
        let device = &mut self.devices[at];
        let waits = core::mem::take(&mut device.numbers[number]).waits;
        assert!(waits, "device {at} has an answer that it does not wait for: {response:?}");
        assert_ne!(response.outcome, Outcome::Failure);
        device.waiting -= 1;
        device.answers += 1;
    }

    fn request(&mut self) {
        let at = self.random.below(self.devices.len() as u64) as usize;
        let own = [0, 1, self.random.below(PASIDS.len() as u64)][at % 3];
        let pasid = if self.random.below(16) == 0 { self.random.below(PASIDS.len() as u64) } else { own };
        let number = pasid as usize * INDICES + self.random.below(INDICES as u64) as usize;
        let last = self.random.below(2) == 0;
        let page = (at * NUMBERS + number) as u64 * 4 + self.random.below(4);
        let device = &mut self.devices[at];
        let request = PageRequest {
            tag: tag(number),
            iova: Iova(page * PAGE_SIZE),
            last,
            ..hosted::rig::last(device.stream, 0, 0)
        };
        let known = &mut device.numbers[number];
        let waited = known.waits;
        known.is_doubled |= waited;
        known.waits |= last;
        device.waiting += u64::from(last && !waited);
        let (is_quiesced, strays) = (device.is_quiesced, self.rig.ledger.strays());
        match self.rig.admit(request, self.now_us) {
            Did::Nothing => assert!(!last, "a last request is never left"),
            Did::Forwarded(queue) => {
                let device = &self.devices[at];
                assert!(last && !waited && !device.is_quiesced && !self.is_shut[queue]);
                assert!(matches!(device.attached, Attached::To(to, _) if to == queue), "it is not its queue");
            }
            Did::Answered(response) => {
                assert!(last, "a part is not answered");
                assert_eq!((response.stream, response.tag), (self.devices[at].stream, tag(number)));
                // The tail of a group that an overflow discarded was counted as that; a stray of a device
                // that is being reset is nobody's.
                let is_tail = response.outcome == Outcome::Success;
                let is_nobodys = is_quiesced && self.rig.ledger.strays() > strays;
                self.take(&response);
                self.devices[at].answers -= u64::from(is_tail || is_nobodys);
            }
        }
    }

    fn deliver(&mut self) {
        let queue = self.random.below(Q as u64) as usize;
        let Some(group) = self.rig.inboxes[queue].next(self.now_us) else { return };
        let at = group.name as usize;
        let device = &mut self.devices[at];
        let pasid = PASIDS.iter().position(|&pasid| pasid == group.tag.pasid.map(Pasid::value));
        let number = pasid.expect("it has three") * INDICES + usize::from(group.tag.index);
        assert_eq!(group.opaque, device.serial, "it is not of this attachment");
        assert!(matches!(device.attached, Attached::To(to, _) | Attached::Leaving(to, _) if to == queue));
        let whose = (at * NUMBERS + number) as u64;
        assert!(group.pages.iter().all(|page| page.iova().0 / PAGE_SIZE / 4 == whose), "pages of others");
        assert!(!group.pages.is_empty());
        let known = &mut device.numbers[number];
        assert!(
            known.waits && known.cookie.is_none() && !known.is_doubled,
            "it was shown twice, or too late"
        );
        known.cookie = Some(group.cookie);
        let told = Told { queue, device: at, number, cookie: group.cookie };
        if self.told.len() < 256 {
            self.told.push(told);
        } else {
            self.told[self.next_told % 256] = told;
            self.next_told += 1;
        }
    }

    /// Some guest answers something that it, or another one, was told some time.
    fn answer(&mut self) {
        if self.told.is_empty() {
            return;
        }
        let mut at = self.random.below(self.told.len() as u64) as usize;
        if self.random.below(2) == 0 {
            let is_live =
                |told: &Told| self.devices[told.device].numbers[told.number].cookie == Some(told.cookie);
            at = (0..self.told.len())
                .map(|n| (at + n) % self.told.len())
                .find(|&at| is_live(&self.told[at]))
                .unwrap_or(at);
        }
        let Told { queue: of, device: at, number, cookie } = self.told[at];
        let queue = if self.random.below(16) == 0 { self.random.below(Q as u64) as usize } else { of };
        let outcome = match self.random.below(1_024) {
            0 => Outcome::Failure,
            1..128 => Outcome::Invalid,
            _ => Outcome::Success,
        };
        let known = self.devices[at].numbers[number];
        let is_live = known.cookie == Some(cookie) && !known.is_doubled && queue == of;
        match self.rig.settle(queue, cookie, outcome, self.now_us) {
            Ok(Some(response)) => {
                assert!(is_live, "a cookie was used twice");
                let sent = if outcome == Outcome::Failure { Outcome::Invalid } else { outcome };
                assert_eq!((response.stream, response.tag), (stream(at), tag(number)));
                assert_eq!(response.outcome, sent);
                self.take(&response);
            }
            Ok(None) => {
                assert!(is_live && outcome == Outcome::Success);
                // The guest has answered: what it says now is late.
                self.devices[at].numbers[number].cookie = Some(Cookie(u64::MAX));
            }
            Err(_) => {
                assert!(!is_live, "an answer in time was refused");
                self.late += 1;
            }
        }
    }

    /// A guest makes a cookie up.
    fn forge(&mut self) {
        let queue = self.random.below(Q as u64) as usize;
        let cookie = Cookie(self.random.number() >> self.random.below(64));
        let is_live = self.told.iter().any(|told| told.cookie == cookie);
        if !is_live && self.rig.ledger.outstanding(self.rig.queues[queue]) == 0 {
            // While groups wait that were not read yet, a guess may be right.
            assert!(self.rig.settle(queue, cookie, Outcome::Success, self.now_us).is_err());
            self.forged += 1;
        }
    }

    fn expire(&mut self) {
        for ended in self.rig.expire(self.now_us) {
            let (Ended::Expired { response, .. } | Ended::Held(response)) = ended;
            self.take(&response);
        }
    }

    fn evict(&mut self, queue: usize, whose: Whose) {
        for response in self.rig.evict(queue, whose, self.now_us) {
            assert_eq!(response.outcome, Outcome::Invalid);
            self.take(&response);
        }
    }

    fn attach_or_leave(&mut self) {
        let at = self.random.below(self.devices.len() as u64) as usize;
        let device = &mut self.devices[at];
        match device.attached {
            Attached::No => {
                let queue = self.random.below(Q as u64) as usize;
                device.serial += 1;
                let policy = Policy {
                    requests: device.requests,
                    name: at as u32,
                    opaque: device.serial,
                    ..self.rig.policy(device.stream, device.id, queue)
                };
                let attached = self.rig.ledger.attach(&policy).expect("there is room");
                device.attached = Attached::To(queue, attached);
            }
            // What is begun is ended sooner.
            Attached::To(queue, attachment) if self.random.below(8) == 0 => {
                self.rig.ledger.leave(attachment);
                device.attached = Attached::Leaving(queue, attachment);
            }
            Attached::To(..) => {}
            Attached::Leaving(queue, attachment) => {
                self.rig.broker.discard_leaving();
                self.evict(queue, Whose::Attachment(attachment));
                self.rig.ledger.detach(attachment);
                let device = &mut self.devices[at];
                device.attached = Attached::No;
                assert_eq!(device.waiting, 0, "device {at} is detached, and waits");
            }
        }
    }

    fn reset(&mut self) {
        let at = self.random.below(self.devices.len() as u64) as usize;
        let Device { id, is_quiesced, .. } = self.devices[at];
        if !is_quiesced {
            if self.random.below(8) != 0 {
                return;
            }
            self.rig.ledger.quiesce_device(id);
        } else {
            self.rig.broker.discard_leaving();
            (0..Q).for_each(|queue| self.evict(queue, Whose::Device(id)));
            assert_eq!(self.devices[at].waiting, 0, "device {at} is reset, and waits");
            self.rig.ledger.resume_device(id);
        }
        self.devices[at].is_quiesced = !is_quiesced;
    }

    /// A guest dies: everything that was attached to its queue goes as well.
    fn die(&mut self) {
        let queue = self.random.below(Q as u64) as usize;
        if !self.is_shut[queue] {
            if self.random.below(8) != 0 {
                return;
            }
            self.rig.ledger.shut(self.rig.queues[queue]);
            self.is_shut[queue] = true;
            return;
        }
        self.rig.broker.discard_leaving();
        self.evict(queue, Whose::All);
        self.rig.ledger.close(self.rig.queues[queue]).expect("no slot is leaked");
        let owner = Owner::Guest(self.random.below(1 << 16) as u16);
        self.rig.queues[queue] = self.rig.ledger.open_at(queue, owner).expect("it is closed");
        self.is_shut[queue] = false;
        for device in &mut self.devices {
            if let Attached::To(to, attachment) | Attached::Leaving(to, attachment) = device.attached
                && to == queue
            {
                assert_eq!(device.waiting, 0, "its guest is dead, and it waits");
                self.rig.ledger.leave(attachment);
                self.rig.ledger.detach(attachment);
                device.attached = Attached::No;
            }
        }
    }

    fn step(&mut self) {
        match self.random.below(1_000) {
            0..420 => self.request(),
            420..640 => self.deliver(),
            640..860 => self.answer(),
            860..900 => self.forge(),
            900..960 => {
                self.now_us = self.now_us.wrapping_add(self.random.below(1_000));
                self.expire();
            }
            960..964 => self.rig.broker.overflowed(self.now_us),
            964..966 => {
                let jump = self.random.below(4_000_000);
                let is_back = self.random.below(4) == 0;
                self.now_us =
                    if is_back { self.now_us.wrapping_sub(jump) } else { self.now_us.wrapping_add(jump) };
                self.expire();
            }
            966..985 => self.attach_or_leave(),
            985..997 => self.reset(),
            _ => self.die(),
        }
    }

    /// Compares the sums.
    fn check(&self, waits: bool) {
        for (at, device) in self.devices.iter().enumerate() {
            let tally = self.rig.ledger.tally(device.id).expect("it is there");
            assert_eq!(tally.answered(), device.answers, "device {at}: {tally:?}");
            let open = tally.opened - tally.answered() - tally.discarded;
            let waiting = device.numbers.iter().filter(|number| number.waits).count() as u64;
            assert_eq!(waiting, device.waiting);
            assert!(
                if waits { open >= waiting } else { open == 0 && waiting == 0 },
                "device {at}: {tally:?}"
            );
            let outstanding = self.rig.ledger.outstanding_requests(device.id);
            assert!(outstanding <= if waits { device.limits.requests.into() } else { 0 }, "device {at}");
        }
        for &queue in &self.rig.queues {
            assert!(self.rig.ledger.outstanding(queue) <= S);
        }
    }

    /// Ends everything.
    fn wind_up(&mut self) {
        for queue in 0..Q {
            self.rig.ledger.shut(self.rig.queues[queue]);
            self.rig.broker.discard_leaving();
            self.evict(queue, Whose::All);
            assert_eq!(self.rig.ledger.outstanding(self.rig.queues[queue]), 0, "a slot was leaked");
        }
        self.check(false);
        self.now_us = self.now_us.wrapping_add(10_000_000);
        assert_eq!(self.rig.expire(self.now_us), []);
    }
}

fn walk<const Q: usize, const S: usize, const N: usize>(devices: usize, steps: u64, seed: u64) {
    println!("{steps} operations, {Q} queues of {S} slots, {devices} devices, PORTCULLIS_SEED={seed}");
    let mut walk = Walk::<Q, S, N>::new(devices, seed);
    for step in 1..=steps {
        walk.step();
        if step % 65_536 == 0 {
            walk.check(true);
        }
        if step % 100_000_000 == 0 {
            println!("  {step} operations");
        }
    }
    walk.check(true);
    walk.wind_up();
    let mut sum = Tally::default();
    for device in &walk.devices {
        sum += walk.rig.ledger.tally(device.id).expect("it is there");
    }
    println!("  {sum:?}, {} answers late, {} cookies forged", walk.late, walk.forged);
    let Tally { succeeded, declined, failed, expired, evicted, refused, .. } = sum;
    let Tally { poisoned, discarded, duplicates, unrepaired, held, .. } = sum;
    for (kind, count) in [
        ("succeeded", succeeded),
        ("declined", declined),
        ("failed", failed),
        ("expired", expired),
        ("evicted", evicted),
        ("refused", refused),
        ("poisoned", poisoned),
        ("discarded", discarded),
        ("duplicates", duplicates),
        ("unrepaired", unrepaired),
        ("held", held),
        ("late", walk.late),
        ("forged", walk.forged),
    ] {
        assert!(count > 0, "none {kind}: the walk went nowhere");
    }
}

/// Each shape of world has its share of the operations.
fn steps() -> u64 {
    number("PORTCULLIS_SOAK", 10_000_000).div_ceil(6)
}

fn seed() -> u64 {
    number("PORTCULLIS_SEED", 4)
}

#[test]
fn one_device_with_one_slot_is_answered_once() {
    walk::<1, 1, { 1 + POISONED }>(1, steps(), seed());
}

#[test]
fn two_devices_of_two_guests_with_three_slots_are_answered_once() {
    walk::<2, 3, { 2 * (3 + POISONED) }>(2, steps(), seed());
}

#[test]
fn devices_that_share_few_slots_are_answered_once() {
    walk::<4, 8, { 4 * (8 + POISONED) }>(12, steps(), seed());
}

#[test]
fn devices_of_four_guests_with_many_slots_are_answered_once() {
    walk::<4, 64, { 4 * (64 + POISONED) }>(16, steps(), seed());
}

#[test]
fn hundreds_of_devices_of_one_guest_are_answered_once() {
    walk::<1, 64, { 64 + POISONED }>(300, steps(), seed());
}

#[test]
fn hundreds_of_devices_of_two_guests_are_answered_once() {
    walk::<2, 1024, { 2 * (1024 + POISONED) }>(500, steps(), seed());
}

#[test]
fn no_forged_cookie_is_accepted() {
    let tries = number("PORTCULLIS_SOAK", 1_000_000);
    let mut rig = Rig::<2, 8, { 2 * (8 + POISONED) }>::new();
    let _ = rig.attached(StreamId(1), &Limits::with_requests(32), 0);
    let _ = rig.attached(StreamId(2), &Limits::with_requests(32), 1);
    let mut live = Vec::new();
    // Slots that were used a few times; half of them hold a group that its guest has read.
    for round in 0..4 {
        for queue in 0..2 {
            for index in 0..8 {
                let asked = rig.admit(last(StreamId(1 + queue as u32), index, (round * 8 + index).into()), 0);
                assert_eq!(asked, Did::Forwarded(queue));
            }
            for group in rig.deliver(queue, 0) {
                if round == 3 && group.tag.index % 2 == 0 {
                    live.push((queue, group.cookie));
                } else {
                    assert!(rig.settle(queue, group.cookie, Outcome::Success, 0).is_ok());
                }
            }
        }
    }
    let before = [0, 1].map(|queue| rig.ledger.missed(rig.queues[queue]).total());
    let mut random = Random::new(seed());
    println!("{tries} forged cookies, PORTCULLIS_SEED={}", seed());

    let mut refused = 0;
    for attempt in 1..=tries {
        let number = random.number();
        let queue = (number & 1) as usize;
        let (_, near) = live[(number >> 1) as usize % live.len()];
        // Random ones; those that differ from a live one in a bit, or by a little; the other queue's.
        let forged = Cookie(match (number >> 8) % 4 {
            0 => number,
            1 => near.0 ^ 1 << (number >> 16 & 63),
            2 => near.0.wrapping_add((number >> 16 & 0xFFFF) << (number >> 32 & 63)),
            _ => near.0 & !0xFFF | number >> 16 & 0xFFF,
        });
        if live.contains(&(queue, forged)) {
            continue;
        }
        let outcome = if number & 2 == 0 { Outcome::Success } else { Outcome::Failure };
        assert!(rig.settle(queue, forged, outcome, 0).is_err(), "attempt {attempt}: {forged:?}");
        refused += 1;
        if attempt % 100_000_000 == 0 {
            println!("  {attempt} tried");
        }
    }

    println!("  {refused} refused, none accepted");
    let after = [0, 1].map(|queue| rig.ledger.missed(rig.queues[queue]).total());
    assert_eq!(after.iter().sum::<u64>() - before.iter().sum::<u64>(), refused);
    assert!(refused > tries / 2);
    for (queue, cookie) in live {
        assert!(rig.settle(queue, cookie, Outcome::Success, 1).is_ok(), "the real ones still stand");
    }
}
