//! What is tried with any bytes at all: the bodies of the fuzz targets in `tests/fuzz`, which `tests/fuzz.rs` runs too.
//!
//! Each takes bytes from hardware or a guest, and fails by a panic. They ask for more than that nothing panics: what comes
//! out is checked against what the tables of the manuals and of the channel allow.

use crate::Window;
use channel::{
    Call, Code, Record, Status,
    call::ARRAY,
    guest::{Frames, Guest},
    host::{Broken, Host, Pushed},
    invalidate::{Handled, Layout, Range, Refusal, Refused, Request as Forget, handle},
    record::{Event, Reason, Request},
    ring::{
        CONSUMER, EVENTS, EVENTS_LOST_WORD, EVENTS_WORD, FRAMES, HEADER, RECORDS, REQUESTS,
        REQUESTS_LOST_WORD, REQUESTS_WORD,
    },
};
use iommu::{DmaBuf, FaultRecord, Iova, PAGE_SIZE, PageRequest, Pasid, Perms, StreamId};
use models::memory::Memory;
use smmuv3::iort;
use std::{
    cell::{Cell, RefCell},
    ops::RangeInclusive,
};
use vtd::dmar::{Dmar, Requester, Scope, Structure};

/// Bytes, taken from the front; zero where there are no more.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes([(); 8].map(|()| self.byte()))
    }

    fn words<const N: usize>(&mut self) -> [u64; N] {
        [(); N].map(|()| self.word())
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

thread_local! {
    /// The frames of a channel and what a guest sees of them. A modelled memory is kept for ever, so there is one.
    static CHANNEL: RefCell<Option<([DmaBuf; FRAMES], Window)>> = const { RefCell::new(None) };
}

/// A guest that writes what it likes into the frame that it may write, while the hypervisor shows requests and events.
///
/// Every index is either one that an honest guest could have written, or the end of the channel; what is shown was pushed.
pub fn channel(data: &[u8]) {
    let (frames, window) = CHANNEL.take().unwrap_or_else(|| {
        let memory = Memory::new(FRAMES * 512);
        let frames = [(); FRAMES].map(|()| memory.take(512, 512));
        let start = frames[0].phys();
        (frames, Window::new(memory, start))
    });
    let mut bytes = Bytes(data);
    let first = if bytes.byte() & 1 == 0 { 0 } else { u64::MAX - 70 };
    let mut attempt = Attempt {
        host: Host::counting_from(first, frames),
        rings: [Expected { produced: first, consumed: first }; 2],
        lost: [0; 2],
        ended: false,
        window,
    };
    while !bytes.is_empty() {
        attempt.step(&mut bytes);
        attempt.check();
    }
    CHANNEL.set(Some((attempt.host.into_frames(), attempt.window)));
}

/// What a ring has to be.
#[derive(Clone, Copy)]
struct Expected {
    produced: u64,
    consumed: u64,
}

struct Attempt {
    host: Host,
    window: Window,
    /// Requests, events.
    rings: [Expected; 2],
    lost: [u64; 2],
    ended: bool,
}

const WORDS: [usize; 2] = [REQUESTS_WORD, EVENTS_WORD];

impl Attempt {
    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let operation = bytes.byte();
        let ring = usize::from(operation >> 7);
        let Expected { produced, consumed } = self.rings[ring];
        match operation & 7 {
            0 => self.claim(ring, bytes.word()),
            1 => self.claim(ring, produced.wrapping_add(bytes.byte().into()).wrapping_sub(66)),
            2 => self.claim(ring, consumed.wrapping_add((bytes.byte() % 70).into())),
            3 => self.read(),
            4 => {
                let events = bytes.byte().into();
                self.lost[1] += events;
                self.host.count_lost_events(events);
            }
            5 => {
                let requests = bytes.byte().into();
                self.lost[0] += requests;
                self.host.count_lost_requests(requests);
            }
            6 => {
                let pages = u64::from(bytes.byte() % 70);
                let first = self.rings[0].produced;
                let records = (0..pages as u32).map(|n| Record::request(&page(first.wrapping_add(n.into()))));
                let pushed = self.host.push_group(records);
                self.pushed(0, pages, pushed);
            }
            _ => {
                let Expected { produced, .. } = self.rings[1];
                let was_lost = self.lost[1];
                let pushed = self.host.push_event(&event(produced));
                self.pushed(1, 1, pushed);
                if pushed == Ok(Pushed::Full) {
                    self.lost[1] = was_lost + 1;
                }
            }
        }
    }

    /// The guest says that it consumed so much.
    fn claim(&self, ring: usize, consumed: u64) {
        self.window.store(CONSUMER, WORDS[ring], consumed);
    }

    /// What a push must have come to, by what the guest claims.
    fn pushed(&mut self, ring: usize, count: u64, found: Result<Pushed, Broken>) {
        let Expected { produced, consumed } = self.rings[ring];
        let claimed = self.window.load(CONSUMER, WORDS[ring]);
        let possible = claimed.wrapping_sub(consumed) <= produced.wrapping_sub(consumed);
        let room = RECORDS - produced.wrapping_sub(claimed).min(RECORDS);
        let expected = if self.ended {
            Ok(Pushed::Ended)
        } else if count > RECORDS {
            Ok(Pushed::TooLarge)
        } else if !possible {
            Err(Broken { produced, consumed: claimed })
        } else if room < count {
            Ok(Pushed::Full)
        } else {
            Ok(Pushed::Yes)
        };
        assert_eq!(found, expected, "{count} after {produced}, of which {claimed} are consumed");
        match found {
            Err(_) => self.ended = true,
            Ok(Pushed::Yes) => {
                self.rings[ring] = Expected { produced: produced.wrapping_add(count), consumed: claimed }
            }
            Ok(Pushed::Full) => self.rings[ring].consumed = claimed,
            Ok(Pushed::TooLarge | Pushed::Ended) => {}
        }
    }

    /// A guest that opens the channel where it claims to be, and reads a record of each ring if it claims what can be.
    fn read(&self) {
        let Some(mut guest) = Guest::open(self.window.clone()) else { panic!("the host made the channel") };
        for (ring, Expected { produced, consumed }) in self.rings.into_iter().enumerate() {
            let claimed = self.window.load(CONSUMER, WORDS[ring]);
            let unread = produced.wrapping_sub(claimed);
            if claimed.wrapping_sub(consumed) > produced.wrapping_sub(consumed) {
                continue;
            }
            let found = match ring {
                0 => guest.next_request().map(|request| request.cookie),
                _ => guest.next_event().map(|event| event.opaque),
            };
            assert_eq!(found, (unread > 0).then_some(claimed), "what was pushed at this index");
        }
    }

    /// What the guest sees in the header.
    fn check(&self) {
        let header = |word| self.window.load(HEADER, word);
        let produced = self.rings.map(|ring| ring.produced);
        assert_eq!(WORDS.map(header), produced);
        assert_eq!([REQUESTS_LOST_WORD, EVENTS_LOST_WORD].map(header), self.lost);
        // The record before the next: whole, and the one that was pushed there.
        for (frame, at) in [(REQUESTS, produced[0]), (EVENTS, produced[1])] {
            let last = at.wrapping_sub(1);
            let place = (last % RECORDS * 8) as usize;
            let record = Record(core::array::from_fn(|word| self.window.load(frame, place + word)));
            let known = record.as_request().map(|r| r.cookie).or(record.as_event().map(|e| e.opaque));
            assert!(known.is_none_or(|known| known == last), "record {last} holds {known:?}");
        }
    }
}

fn page(at: u64) -> Request {
    Request {
        cookie: at,
        device: 1,
        pasid: Pasid::new(5),
        opaque: !at,
        group: 3,
        iova: Iova(at << 12),
        perms: Perms::READ,
        pages: 1,
        index: 0,
    }
}

fn event(at: u64) -> Event {
    Event {
        number: 0,
        lost: 0,
        device: 1,
        pasid: None,
        opaque: at,
        iova: Iova(at << 12),
        perms: Perms::READ,
        reason: Reason::Other,
    }
}

/// The arguments of a hypercall, and the array of `Invalidate`: layout, budget, entries.
pub fn invalidation(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (layout, budget) = (bytes.byte(), usize::from(bytes.byte() % 20));
    let number = bytes.word();
    assert!(Call::from_number(number).is_none_or(|call| call as u64 == number));
    assert!(Code::from_number(number).is_none_or(|code| code as u64 == number));
    assert!(Status::from_number(number).is_none_or(|status| status as u64 == number));

    let Some(layout) = Layout::from_number(u64::from(layout % 5)) else { return };
    let mut words = Vec::new();
    while !bytes.is_empty() {
        words.push(bytes.word());
    }
    let entries = words.len() / layout.words();
    let mut seen = Vec::new();
    let found = handle(layout, &words, budget, |request| {
        seen.push(request);
        if seen.len() == 7 { Err(Refusal { why: Refused::NotYours, word: 0, bits: 0 }) } else { Ok(()) }
    });

    let Handled { handled, refusal, more } = found;
    assert!(handled <= budget.min(ARRAY as usize).min(entries));
    assert_eq!(more, refusal.is_none() && handled < entries);
    assert_eq!(
        seen.len(),
        handled + usize::from(refusal.is_some_and(|refusal| refusal.why == Refused::NotYours))
    );
    assert!(seen.iter().all(is_sound));
    if let Some(refusal) = refusal {
        let entry = &words[handled * layout.words()..][..layout.words()];
        let Some(word) = entry.get(refusal.word as usize) else { panic!("{refusal:?} of {entry:#x?}") };
        assert_eq!(refusal.bits & !word, 0, "what is wrong is in the entry");
    }
    if layout == Layout::SmmuCommand {
        check_vmid(&words[..handled * 2], &seen);
    }
}

/// Whether a request is for addresses that there are.
fn is_sound(request: &Forget) -> bool {
    let range = match *request {
        Forget::Attachment { range, .. } | Forget::Stage1 { range, .. } | Forget::DeviceTlb { range, .. } => {
            range
        }
        Forget::Contexts { .. } => Range::All,
    };
    match range {
        Range::All => true,
        Range::Pages { first, pages } => {
            let end = u128::from(first.0) + u128::from(pages) * u128::from(PAGE_SIZE);
            first.0.is_multiple_of(PAGE_SIZE) && pages > 0 && end <= 1 << 64
        }
    }
}

/// Commands of another VMID ask for the same.
fn check_vmid(commands: &[u64], requests: &[Forget]) {
    let others: Vec<u64> = commands
        .chunks_exact(2)
        .flat_map(|command| {
            let has_vmid = matches!(command[0] & 0xFF, 0x10..=0x13);
            [command[0] ^ if has_vmid { 0xA5A5 << 32 } else { 0 }, command[1]]
        })
        .collect();
    let mut at = 0;
    let found = handle(Layout::SmmuCommand, &others, usize::MAX, |request| {
        assert_eq!(Some(&request), requests.get(at));
        at += 1;
        Ok(())
    });
    assert_eq!((found.handled, found.refusal), (commands.len() / 2, None));
}

/// Entries of the queues of both units, and a record of the channel.
pub fn queue_entries(data: &[u8]) {
    let words: [u64; 8] = Bytes(data).words();
    let [a, b, c, d, ..] = words;

    vtd_request(vtd::events::RequestEntry([a, b, c, d]));
    if let Some(fault) = vtd::events::FaultEntry([a, b]).decode() {
        check_fault(fault, 0xFFFF);
    }
    assert_eq!(vtd::events::FaultEntry([a, b]).decode().is_some(), b >> 63 == 1, "F is bit 127");
    check_fault(smmuv3::events::EventRecord([a, b, c, d]).decode(), u32::MAX);
    match smmuv3::events::RequestEntry([a, b]).decode() {
        iommu::Event::PageRequest(request) => check_request(request, u32::MAX),
        iommu::Event::StopMarker { pasid, .. } => assert!(pasid.is_some()),
        other => panic!("{other:?}"),
    }

    let record = Record(words);
    let (request, event) = (record.as_request(), record.as_event());
    assert!(request.is_none() || event.is_none());
    // What a guest read, written once more, is the same to a guest.
    if let Some(request) = request {
        assert_eq!(Record::request(&request).as_request(), Some(request));
    }
    if let Some(event) = event {
        assert_eq!(Record::event(&event).as_event(), Some(event));
    }
}

fn vtd_request(entry: vtd::events::RequestEntry) {
    match entry.decode() {
        iommu::Event::PageRequest(request) => check_request(request, 0xFFFF),
        iommu::Event::StopMarker { pasid, .. } => assert!(pasid.is_some()),
        iommu::Event::Malformed { words, group } => {
            assert!(words[0] & 0xFF != 1 && words == [entry.0[0], entry.0[1]]);
            assert!(group.is_none_or(|(stream, tag)| stream.0 <= 0xFFFF && tag.index < 512));
        }
        other => panic!("{other:?}"),
    }
}

fn check_fault(fault: FaultRecord, last_stream: u32) {
    assert!(fault.stream <= StreamId(last_stream));
    assert!(fault.pasid.is_none_or(|pasid| pasid.value() <= Pasid::MAX));
    assert!(fault.iova.0.is_multiple_of(PAGE_SIZE) && fault.code <= 0x7FF);
    let event = Event {
        number: 1,
        lost: 0,
        device: 1,
        pasid: fault.pasid,
        opaque: 2,
        iova: fault.iova,
        perms: Perms::READ,
        reason: fault.reason.into(),
    };
    assert_eq!(Record::event(&event).as_event(), Some(event));
}

fn check_request(request: PageRequest, last_stream: u32) {
    assert!(request.stream <= StreamId(last_stream));
    assert!(request.tag.index <= 0x1FF && request.iova.0.is_multiple_of(PAGE_SIZE));
    let shown = Request {
        cookie: 1,
        device: 1,
        pasid: request.tag.pasid,
        opaque: 2,
        group: request.tag.index,
        iova: request.iova,
        perms: request.perms,
        pages: 1,
        index: 0,
    };
    // An access that may execute is told as a fetch, which reads and does not write.
    let perms = match request.perms {
        Perms { execute: true, privileged, .. } => Perms { execute: true, privileged, ..Perms::READ },
        perms => perms,
    };
    assert_eq!(Record::request(&shown).as_request(), Some(Request { perms, ..shown }));
}

/// The structures of a `DMAR` table, after the segment and requester ID of a device, and what says where
/// bridges lead.
///
/// Half of the tables have a header that is right, so that the structures are read at all.
pub fn dmar(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (kind, segment, seed) = (bytes.byte(), bytes.byte(), bytes.byte());
    let id = u32::from(bytes.byte()) << 8 | u32::from(bytes.byte());
    let header_bytes = if kind & 1 == 0 { 0 } else { 48 };
    let mut table = vec![0; header_bytes];
    table.extend(bytes.0);
    if kind & 1 != 0 {
        table[..4].copy_from_slice(b"DMAR");
        let length = table.len() as u32;
        table[4..8].copy_from_slice(&length.to_le_bytes());
        table[36] = if kind & 2 == 0 { 47 } else { seed };
    }
    let Ok(dmar) = Dmar::new(&table) else { return };

    let structures: Vec<_> = dmar.structures().collect();
    let read: usize = std::iter::successors(Some(48), |&at| {
        let length = u16::from_le_bytes([*table.get(at + 2)?, *table.get(at + 3)?]);
        Some(at + usize::from(length))
    })
    .take_while(|&at| at < table.len())
    .count();
    assert_eq!(structures.len(), read, "each structure once, by its length");
    let scopes: Vec<_> = structures.iter().flat_map(scopes_of).collect();
    assert!(scopes.len() * 6 + structures.len() * 4 + 48 <= table.len(), "no byte counts twice");

    // A bridge leads where a few bits of its ID and the seed say, or nowhere.
    let asked = Cell::new(0);
    let buses = |bridge: Requester| -> Option<RangeInclusive<u8>> {
        asked.set(asked.get() + 1);
        let mixed = (bridge.id.0 ^ u32::from(seed)).wrapping_mul(0x9E37_79B1);
        (mixed & 7 != 0).then_some((mixed >> 24) as u8..=(mixed >> 16) as u8)
    };
    let device = Requester { segment: segment.into(), id: StreamId(id) };
    match dmar.unit_of(device, buses) {
        Some(unit) => {
            assert_eq!(unit.segment, device.segment);
            assert!(unit.include_pci_all || unit.scopes.count() > 0, "somebody claimed it");
            assert!(dmar.units().any(|other| other == unit));
        }
        None => assert!(!dmar.units().any(|u| u.segment == device.segment && u.include_pci_all)),
    }
    for region in dmar.regions_of(device, buses) {
        assert!(region.base < region.end && region.segment == device.segment && region.scopes.count() > 0);
        assert!((region.base.0 | region.end.0).is_multiple_of(PAGE_SIZE));
        assert!(u128::from(region.end.0) <= 1 << dmar.address_bits().min(64));
    }
    let _ = dmar.ats_of(device, buses);
    for scope in &scopes {
        if let Some(found) = scope.requester(device.segment, buses) {
            assert!(found.segment == device.segment && found.id.0 <= 0xFFFF);
        }
        let _ = dmar.source(scope.kind, scope.id, |_| None);
    }
    // Two bytes of path ask once for each question about each scope, and a bridge once more for what is
    // behind it.
    assert!(asked.get() <= 4 * table.len(), "{} questions about {} bytes", asked.get(), table.len());
}

fn scopes_of<'t>(structure: &Structure<'t>) -> Vec<Scope<'t>> {
    match *structure {
        Structure::Unit(unit) => unit.scopes.collect(),
        Structure::Region(region) => region.scopes.collect(),
        Structure::Atsr { scopes, .. } | Structure::Satc { scopes, .. } | Structure::Sidp { scopes, .. } => {
            scopes.collect()
        }
        _ => Vec::new(),
    }
}

/// An `IORT` table: two bytes of segment and two of requester ID, then the table; its length is made to fit.
///
/// Its nodes lie one after the other inside it, whatever is found is one of them, and what cannot be is an error that
/// names a node which is there.
pub fn iort(data: &[u8]) {
    let mut bytes = Bytes(data);
    let [segment, requester] = [(); 2].map(|()| u16::from_le_bytes([bytes.byte(), bytes.byte()]));
    let mut table = bytes.0.to_vec();
    let length = (table.len() as u32).to_le_bytes();
    if let Some(field) = table.get_mut(4..8) {
        field.copy_from_slice(&length);
    }
    let Ok(iort) = iort::Iort::new(&table) else {
        assert!(table.len() < 48 || !table.starts_with(b"IORT"));
        return;
    };

    let nodes: Vec<_> = iort.nodes().collect();
    assert!(nodes.len() <= table.len() / 16 + 1);
    let offsets: Vec<_> = nodes.iter().flatten().map(iort::Node::offset).collect();
    assert!(offsets.is_sorted_by(|a, b| a + 16 <= *b) && offsets.iter().all(|at| at + 16 <= table.len()));
    let whole = nodes.iter().all(Result::is_ok);
    let named = |error: iort::Error| match error {
        iort::Error::Node { offset, kind, .. } => {
            assert_eq!(table.get(offset), Some(&kind));
            assert!(offsets.contains(&offset) || !whole);
        }
        iort::Error::Ends { missing, .. } => assert!(missing > 0 && !whole),
        other => panic!("{other:?}"),
    };

    match iort.endpoint(segment, requester) {
        Ok(Some(found)) => {
            assert_eq!(found.root_complex.segment, u32::from(segment));
            assert!(iort.units().any(|unit| unit == Ok(found.place.unit)));
            for region in iort.regions(&found.place.unit, found.place.stream) {
                match region {
                    Ok(region) => {
                        assert!(
                            region.bytes > 0
                                && region.bytes % 0x1_0000 == 0
                                && region.start.0 % 0x1_0000 == 0
                        );
                        assert!(region.start.0.checked_add(region.bytes - 1).is_some());
                    }
                    Err(error) => named(error),
                }
            }
        }
        Ok(None) => assert!(whole, "half a table does not say that there is nothing"),
        Err(error) => named(error),
    }
    let _ = iort.interrupts(segment, requester).map_err(named);
    for unit in iort.units().flatten() {
        let _ = iort.interrupts_of(&unit).map_err(named);
    }
    for node in nodes.into_iter().flatten() {
        match node {
            iort::Node::NamedComponent(component) => {
                assert!(iort.component(component.path).is_ok_and(|found| found.is_some()));
                for place in iort.component_streams(&component) {
                    let _ = place.map_err(named);
                }
                let _ = iort.component_stream(&component, requester.into()).map_err(named);
            }
            iort::Node::ItsGroup(group) => assert!(group.identifiers().count() * 4 <= table.len()),
            _ => {}
        }
    }
}
