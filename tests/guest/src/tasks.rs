//! What a guest may be told to do, and the steps that the tasks share.

mod batch;
mod claims;
mod entries;
mod event;
mod flood;
mod forgery;
mod hold;
mod isolation;
mod leave;
mod losses;
mod neighbour;
mod nested;
mod refused;
mod repair;
mod restraint;
mod silence;
mod storm;
mod unmaps;
mod watch;

use crate::{
    calls::demand,
    device::{Device, NO_PASID, Operation, Status, WRITE},
    ensure,
    memory::Page,
    say,
    say::Failed,
    serve::{Answered, Group, Server, answer_all},
};
use channel::{
    Call, Code,
    call::{NONE, VERSION, WRITABLE},
    record::{Request, Wanted},
};
use heapless::Vec;
use iommu::{Iova, PAGE_SIZE, Pasid, Perms};

/// The one device that the tasks use, as the guest calls it.
const DEVICE: u64 = 1;
/// What a forged or late answer gets, given alone.
const REFUSED: Answered = Answered { handled: 1, refused: 1 };

/// When an operation starts that is to find the guest asleep, in microseconds from now.
const LATE_US: u32 = 50_000;
/// When the alarm comes: before a wait for the channel ends by itself.
const ALARM_US: u32 = 1_000_000;
const ALARM_LANE: u64 = 7;

const EVENT: u64 = 1;
const WATCH: u64 = 2;
const REPAIR: u64 = 3;
const SILENCE: u64 = 4;
const FORGERY: u64 = 5;
const HOLD: u64 = 6;
/// Ends [`HOLD`], [`NEIGHBOUR`] and [`UNMAPS`], and begins what [`FLOOD`] is for.
const RELEASE: u64 = 7;
const LEAVE: u64 = 8;
const ISOLATION: u64 = 9;
const RESTRAINT: u64 = 10;
const NEIGHBOUR: u64 = 11;
const CLAIMS: u64 = 12;
const FLOOD: u64 = 13;
const BATCH: u64 = 14;
const NESTED: u64 = 15;
const REFUSED_INTERRUPT: u64 = 16;
const LOSSES: u64 = 17;
const UNMAPS: u64 = 18;
const STORM: u64 = 19;

/// Asks for the task, and does it.
pub fn run() -> Result<(), Failed> {
    let [version, ..] = demand(Call::Probe, [0; 4])?;
    ensure!(version == VERSION, "the hypervisor speaks version {version}, this guest {VERSION}");
    let [task, first, second] = demand(Call::Task, [0; 4])?;
    match task {
        EVENT => event::run(first != 0),
        WATCH => watch::run(first),
        REPAIR => repair::run(first),
        SILENCE => silence::run(),
        FORGERY => forgery::run(first),
        HOLD => hold::run(),
        LEAVE => leave::run(),
        ISOLATION => isolation::run([first, second]),
        RESTRAINT => restraint::run(),
        NEIGHBOUR => neighbour::run(),
        CLAIMS => claims::run(),
        FLOOD => flood::run(),
        BATCH => batch::run(),
        NESTED => nested::run(first),
        REFUSED_INTERRUPT if first != 0 => refused::at_the_doorbell(first),
        REFUSED_INTERRUPT => refused::run(),
        LOSSES => losses::run(),
        UNMAPS => unmaps::run(),
        STORM => storm::run(),
        _ => {
            say!("this guest knows no task {task}");
            Err(Failed)
        }
    }
}

/// The channel, open, and the device, attached: where most tasks begin.
struct Bench {
    server: Server,
    assigned: Assigned,
}

impl Bench {
    /// Opens the channel, resets the device and attaches it with `opaque`; groups are to be answered within `deadline_us`.
    fn set_up(opaque: u64, deadline_us: u64) -> Result<Self, Failed> {
        let server = Server::open()?;
        let device = Device::find(DEVICE)?;
        Ok(Self { server, assigned: Assigned::attach(device, opaque, deadline_us)? })
    }

    /// Waits for a group that must be a read of the page at `iova`.
    fn wait_read(&mut self, iova: u64) -> Result<Group, Failed> {
        let group = self.server.wait_group()?;
        self.assigned.check_requests(&group, &[iova], Access::Read)?;
        Ok(group)
    }

    /// Waits for a group for each page in `iovas`, which must be read: lanes ask in any order. Returns the groups as they
    /// came, each with the place of its page in `iovas`.
    fn wait_reads<const N: usize>(&mut self, iovas: [u64; N]) -> Result<Vec<(usize, Group), N>, Failed> {
        let mut groups = Vec::<(usize, Group), N>::new();
        for _ in 0..N {
            let group = self.server.wait_group()?;
            let wanted = group.requests.first().map_or(0, |request| request.iova.0);
            let at = iovas.iter().position(|iova| *iova == wanted);
            let Some(at) = at.filter(|at| groups.iter().all(|(taken, _)| taken != at)) else {
                say!("a group asks for {wanted:#x}, which no lane reads, or which was asked for before");
                return Err(Failed);
            };
            self.assigned.check_requests(&group, &[wanted], Access::Read)?;
            // There is room: no more than `N` come here.
            let _ = groups.push((at, group));
        }
        Ok(groups)
    }
}

/// What a device does, or may do, with a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Access {
    /// Read alone.
    Read,
    /// Of a request: write alone. Of a mapping: read and write.
    Write,
}

/// The device, attached: with a PASID where the machine has them.
struct Assigned {
    device: Device,
    pasid: Option<Pasid>,
    opaque: u64,
    attachment: u64,
    /// Pages mapped so far.
    mapped: u64,
    /// Calls of [`Call::Unmap`] so far.
    unmaps: u64,
}

impl Assigned {
    fn attach(device: Device, opaque: u64, deadline_us: u64) -> Result<Self, Failed> {
        let [_, _, first_pasid] = demand(Call::Probe, [0; 4])?;
        let pasid = u32::try_from(first_pasid).ok().and_then(Pasid::new);
        ensure!(pasid.is_some() || first_pasid == NONE, "the first PASID {first_pasid:#x} is none");
        let mut assigned = Self { device, pasid, opaque, attachment: 0, mapped: 0, unmaps: 0 };
        assigned.attach_again(deadline_us)?;
        Ok(assigned)
    }

    /// Attaches the device, which must be detached.
    fn attach_again(&mut self, deadline_us: u64) -> Result<(), Failed> {
        let pasid = self.pasid.map_or(NONE, |pasid| pasid.value().into());
        let arguments = [DEVICE, pasid, self.opaque, deadline_us];
        [self.attachment, ..] = demand(Call::Attach, arguments)?;
        Ok(())
    }

    fn detach(&mut self) -> Result<(), Failed> {
        demand(Call::Detach, [self.attachment, 0, 0, 0]).map(drop)
    }

    fn map(&mut self, iova: u64, page: &Page, access: Access) -> Result<(), Failed> {
        let writable = if access == Access::Write { WRITABLE } else { 0 };
        demand(Call::Map, [self.attachment | writable, iova, page.address(), PAGE_SIZE])?;
        self.mapped += 1;
        Ok(())
    }

    fn unmap(&mut self, iova: u64, pages: u64) -> Result<(), Failed> {
        demand(Call::Unmap, [self.attachment, iova, pages * PAGE_SIZE, 0])?;
        self.unmaps += 1;
        Ok(())
    }

    /// Starts a read of the page at `iova`.
    fn start_read(&self, lane: u64, iova: u64, control: u32) -> Result<(), Failed> {
        self.start(lane, iova, PAGE_SIZE as u32, 0, control)
    }

    /// Starts a write of `bytes` at `iova`: words that count up from `data`.
    fn start_write(&self, lane: u64, iova: u64, bytes: u64, data: u64) -> Result<(), Failed> {
        self.start(lane, iova, bytes as u32, data, WRITE)
    }

    fn start(&self, lane: u64, address: u64, bytes: u32, data: u64, control: u32) -> Result<(), Failed> {
        self.device.start(lane, &self.operation(address, bytes, data, control))
    }

    /// Starts an operation in [`LATE_US`], so that the guest is asleep by then, and sets the alarm by which it must have been
    /// woken.
    fn start_late(&self, lane: u64, address: u64, bytes: u32, data: u64, control: u32) -> Result<(), Failed> {
        // An operation on nothing: it fails as soon as it starts, and does nothing else.
        let alarm = Operation { address: 0, bytes: 0, pasid: 0, data: 0, control: 0 };
        self.device.start_after(ALARM_US, ALARM_LANE, &alarm)?;
        self.device.start_after(LATE_US, lane, &self.operation(address, bytes, data, control))
    }

    /// Checks that the alarm of [`start_late`](Self::start_late) has not come yet: what woke the guest was no end of a wait.
    fn expect_early(&self) -> Result<(), Failed> {
        let status = self.device.status(ALARM_LANE);
        ensure!(status == Status::Busy, "nobody woke the guest before its alarm: {status:?}");
        Ok(())
    }

    fn operation(&self, address: u64, bytes: u32, data: u64, control: u32) -> Operation {
        let (pasid, without) = self.pasid.map_or((0, NO_PASID), |pasid| (pasid.value(), 0));
        Operation { address, bytes, pasid, data, control: control | without }
    }

    /// Checks that `group` asks for `access` to `pages`, in this order, and says so in every bit of its records.
    fn check_requests(&self, group: &Group, pages: &[u64], access: Access) -> Result<(), Failed> {
        let count = group.requests.len();
        ensure!(count == pages.len(), "a group of {count} pages instead of {}", pages.len());
        let perms =
            Perms { read: access == Access::Read, write: access == Access::Write, ..Perms::default() };
        for ((index, found), page) in (0..).zip(&group.requests).zip(pages) {
            let expected = Request {
                cookie: group.cookie,
                device: DEVICE as u32,
                pasid: self.pasid,
                opaque: self.opaque,
                group: found.group,
                iova: Iova(*page),
                perms,
                pages: count as u32,
                index,
            };
            let Request { device, pasid, opaque, iova: Iova(iova), .. } = *found;
            let pasid = pasid.map(Pasid::value);
            ensure!(
                *found == expected,
                "not {access:?} {page:#x}, page {index} of {count}: {iova:#x} {:?} of device {device} {pasid:x?} {opaque:#x}",
                Wanted::from(found.perms)
            );
        }
        Ok(())
    }

    /// Waits until `lane` has read a page, which must have been `page`.
    fn expect_read(&self, lane: u64, page: &Page) -> Result<(), Failed> {
        self.device.expect(lane, Status::Done)?;
        let (found, expected) = (self.device.data(lane), page.checksum());
        ensure!(found == expected, "lane {lane} read the checksum {found:#x} instead of {expected:#x}");
        Ok(())
    }

    /// Gives `lane` the page that it reads and asked for in `group`.
    fn repair_read(&mut self, group: &Group, lane: u64, iova: u64, page: &Page) -> Result<(), Failed> {
        self.map(iova, page, Access::Read)?;
        answer_all(&[group.answer(Code::Success)])?;
        self.expect_read(lane, page)
    }

    /// Checks that `lane` still waits.
    fn expect_busy(&self, lane: u64) -> Result<(), Failed> {
        let status = self.device.status(lane);
        ensure!(status == Status::Busy, "lane {lane} should wait and is {status:?}");
        Ok(())
    }
}
