//! Who owns which frame of RAM: the promises behind [`DmaBuf`], [`Root`] and [`Grant`].
//!
//! All RAM that the hypervisor hands out comes from one [`Pool`], and a frame has one owner at a time. That is what the
//! `unsafe` blocks of this file rest on, and no other file of the hypervisor has any.
#![expect(unsafe_code, reason = "physical memory becomes typed memory here, and nowhere else")]

use arch::{bus::Mmio, cpu::Locked};
use core::{
    cell::Cell,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Release, SeqCst},
    },
};
use iommu::{Bus, DmaBuf, Gpa, Grant, PAGE_SIZE, PhysAddr, Root, Trust};
use pgtable::{Format, Table as _, Tree, Words as _};

/// Frames that the pool manages, at most: 256 MiB.
const FRAMES: usize = 1 << 16;
/// 64-bit words of a frame.
pub const FRAME_WORDS: usize = PAGE_SIZE as usize / 8;

/// The frames of RAM that belong to the hypervisor.
pub struct Pool {
    start: u64,
    frames: usize,
    /// The same in bytes.
    bytes: u64,
    /// Where the first frame is mapped. The others follow, as the frames do.
    mapped: usize,
    /// Bit n set: frame n has an owner.
    taken: [u64; FRAMES / 64],
    in_use: usize,
    /// The word of `taken` where the next single frame is looked for first.
    hint: usize,
    /// Makes stores to tables visible to the unit. There is one as soon as there are frames.
    publisher: Option<Mmio>,
}

impl Pool {
    /// A pool without frames.
    pub const fn empty() -> Self {
        Self {
            start: 0,
            frames: 0,
            bytes: 0,
            mapped: 0,
            taken: [0; FRAMES / 64],
            in_use: 0,
            hint: 0,
            publisher: None,
        }
    }

    /// Takes over the largest of `regions`, usable RAM that nobody owns. Called once.
    pub fn adopt(&mut self, regions: impl Iterator<Item = Range<PhysAddr>>, publisher: Mmio) {
        let bytes = |region: &Range<PhysAddr>| region.end.0.saturating_sub(region.start.0);
        let Some(region) = regions.max_by_key(bytes) else { return };
        let frames = (bytes(&region) / PAGE_SIZE).min(FRAMES as u64);
        // What lies between two addresses that `direct` reaches is mapped as they are.
        let last = frames.checked_sub(1).map(|last| PhysAddr(region.start.0 + last * PAGE_SIZE));
        let ends = (arch::bus::direct(region.start), last.and_then(arch::bus::direct));
        if let (Some(first), Some(_)) = ends {
            self.start = region.start.0;
            self.frames = frames as usize;
            self.bytes = frames * PAGE_SIZE;
            self.mapped = first.as_ptr().expose_provenance();
            self.publisher = Some(publisher);
        }
    }

    /// Returns the number of frames that have an owner.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// Takes one frame. Looks at each word of the map once, at most.
    fn take_one(&mut self) -> Option<PhysAddr> {
        let words = self.frames.div_ceil(64);
        let word = (0..words).map(|n| (self.hint + n) % words).find(|&word| self.taken[word] != u64::MAX)?;
        let frame = word * 64 + self.taken[word].trailing_ones() as usize;
        if frame >= self.frames {
            // The last word is not whole: what it has no frames for looks free.
            return self.take_run(1);
        }
        self.hint = word;
        self.taken[word] |= 1 << (frame % 64);
        self.in_use += 1;
        Some(PhysAddr(self.start + frame as u64 * PAGE_SIZE))
    }

    /// Takes `count` frames in a row, aligned to `count` rounded up to a power of two. Their content is whatever it was.
    fn take_run(&mut self, count: usize) -> Option<PhysAddr> {
        let align = count.checked_next_power_of_two()? as u64 * PAGE_SIZE;
        let skew = (self.start.next_multiple_of(align) - self.start) / PAGE_SIZE;
        let step = count.next_power_of_two();
        let first = (skew as usize..self.frames.checked_sub(count)? + 1)
            .step_by(step)
            .find(|&at| (at..at + count).all(|frame| self.taken[frame / 64] >> (frame % 64) & 1 == 0))?;
        for frame in first..first + count {
            self.taken[frame / 64] |= 1 << (frame % 64);
        }
        self.in_use += count;
        Some(PhysAddr(self.start + first as u64 * PAGE_SIZE))
    }

    fn give_back_run(&mut self, phys: PhysAddr, count: usize) {
        let first = (phys.0.wrapping_sub(self.start) / PAGE_SIZE) as usize;
        for frame in first..first.saturating_add(count).min(self.frames) {
            self.taken[frame / 64] &= !(1 << (frame % 64));
            self.in_use -= 1;
        }
    }

    /// Takes back what `cut` gave. No device and no guest reaches it any more.
    pub fn give_back(&mut self, buffer: DmaBuf) {
        self.give_back_run(buffer.phys(), buffer.words() / FRAME_WORDS);
    }

    /// Keeps `value` in frames of its own, for ever.
    pub fn keep<T>(&mut self, value: T) -> Option<&'static mut T> {
        const { assert!(align_of::<T>() <= PAGE_SIZE as usize, "frames are aligned to 4 KiB") };
        let phys = self.take_run(size_of::<T>().div_ceil(PAGE_SIZE as usize).max(1))?;
        let mut place: NonNull<T> = arch::bus::direct(phys)?.cast();
        // SAFETY: the frames are RAM, mapped, aligned and large enough for a `T`, and owned by nobody else.
        unsafe { place.write(value) };
        // SAFETY: the value was just written; the frames are never given back, and this is the only reference.
        Some(unsafe { place.as_mut() })
    }
}

/// A frame of the pool that is a table. Hardware may walk it, and change it.
#[derive(Clone, Copy)]
pub struct Table(&'static [AtomicU64; FRAME_WORDS]);

impl pgtable::Table for Table {
    #[inline(always)]
    fn load(self, index: usize) -> u64 {
        self.0[index].load(Acquire)
    }

    #[inline(always)]
    fn store(self, index: usize, value: u64) {
        self.0[index].store(value, Release);
    }

    fn exchange(self, index: usize, current: u64, new: u64) -> Result<(), u64> {
        self.0[index].compare_exchange(current, new, SeqCst, Acquire).map(|_| ())
    }
}

impl pgtable::Words for Pool {
    type Table = Table;

    #[inline(always)]
    fn table(&self, frame: PhysAddr) -> Table {
        // What lies before the first frame is far after it when it wraps.
        let offset = frame.0.wrapping_sub(self.start);
        assert!(offset < self.bytes, "tables lie in frames of the pool");
        let at = ptr::with_exposed_provenance(self.mapped + (offset & !(PAGE_SIZE - 1)) as usize);
        // SAFETY: the frame is RAM that `adopt` found mapped, and aligned. It was taken as a table, and while it is one
        // everybody reaches it by atomic accesses alone.
        Table(unsafe { &*at })
    }
}

impl pgtable::Frames for Pool {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        // The formats of both machines have tables of one frame, the top one included.
        let phys = if bytes == PAGE_SIZE as usize { self.take_one()? } else { return None };
        let table = self.table(phys);
        for index in 0..FRAME_WORDS {
            table.store(index, 0);
        }
        self.publish(phys..PhysAddr(phys.0 + PAGE_SIZE));
        Some(phys)
    }

    fn give_back(&mut self, frame: PhysAddr, _bytes: usize) {
        self.give_back_run(frame, 1);
    }

    fn publish(&self, range: Range<PhysAddr>) {
        if let Some(publisher) = &self.publisher {
            publisher.publish(range);
        }
    }
}

/// Cuts `frames` frames out of `pool`, zeroed, aligned to their size if that is a power of two.
///
/// The zeroes are past the caches: whoever does not look into those finds them, and none of them lands later on what it has
/// stored there. All of that happens when the pool is free for others again, since it takes longest.
pub fn cut(pool: &Locked<Pool>, frames: usize) -> Option<DmaBuf> {
    let (phys, publisher) = pool.with(|pool| Some((pool.take_run(frames)?, pool.publisher)))?;
    let cpu = arch::bus::direct(phys)?;
    // SAFETY: the frames are RAM that is mapped at `cpu`, page-aligned, and were free until now; `take_run` gives them to
    // nobody else before `give_back`, which consumes the value.
    let mut buffer = unsafe { DmaBuf::new(cpu, phys, frames * FRAME_WORDS) };
    buffer.clear();
    if let Some(publisher) = publisher {
        publisher.publish(buffer.range(0, buffer.words()));
    }
    Some(buffer)
}

/// The table frames that one owner may take from the pool, so that none takes those of another.
pub struct Share {
    left: Cell<usize>,
}

impl Share {
    /// A share of `frames` frames.
    pub const fn new(frames: usize) -> Self {
        Self { left: Cell::new(frames) }
    }

    /// Lets `f` take frames of `pool` up to the share, and give them back.
    pub fn with<R>(&self, pool: &Locked<Pool>, f: impl FnOnce(&mut Shared<'_>) -> R) -> R {
        pool.with(|pool| f(&mut Shared { pool, left: &self.left }))
    }
}

/// A source of table frames that ends with a [`Share`].
pub struct Shared<'s> {
    pool: &'s mut Pool,
    left: &'s Cell<usize>,
}

impl pgtable::Words for Shared<'_> {
    type Table = Table;

    #[inline(always)]
    fn table(&self, frame: PhysAddr) -> Table {
        self.pool.table(frame)
    }
}

impl pgtable::Frames for Shared<'_> {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        let left = self.left.get().checked_sub(1)?;
        let frame = self.pool.take(bytes)?;
        self.left.set(left);
        Some(frame)
    }

    fn give_back(&mut self, frame: PhysAddr, bytes: usize) {
        pgtable::Frames::give_back(self.pool, frame, bytes);
        self.left.set(self.left.get() + 1);
    }

    #[inline(always)]
    fn publish(&self, range: Range<PhysAddr>) {
        self.pool.publish(range);
    }
}

/// Names the root of `tree` for a unit or a core to walk.
///
/// Trees map only what was granted to the guest that they serve, and are taken down only after their guest stopped and
/// the invalidation that follows the detachment has completed; otherwise their frames are never used again.
pub fn root<F: Format>(tree: &Tree<F>) -> Root {
    // SAFETY: the life of a tree, above; its tables are frames of the pool until it is taken down.
    unsafe { Root::new(tree.root(), tree.levels()) }
}

/// Vouches for a device that the command line names as trusted.
pub fn trust() -> Trust {
    // SAFETY: who wrote the command line says that the device, and whoever drives it, may reach all of memory. The
    // hypervisor drives it itself, and gives it to no guest.
    unsafe { Trust::new() }
}

/// Grants registers of a device that a guest owns.
pub fn registers(range: Range<PhysAddr>) -> Grant {
    // SAFETY: no hypervisor data lives in the registers of a device, and what its DMA reaches is the IOMMU's to bound.
    unsafe { Grant::new(range) }
}

/// Grants the page to which devices write their messages, to be mapped for devices alone.
pub fn doorbell(page: Range<PhysAddr>) -> Grant {
    // SAFETY: no hypervisor data lives there. A write makes an interrupt of the device that wrote, if the hypervisor opened
    // one for it, and handlers are safe at any time.
    unsafe { Grant::new(page) }
}

/// Opens registers of a device that the hypervisor itself drives. `None` if they are out of its reach.
pub fn device(range: Range<PhysAddr>) -> Option<Mmio> {
    let bytes = range.end.0.checked_sub(range.start.0)?;
    // Everything that `direct` reaches is mapped, and so is what lies between two such addresses.
    arch::bus::direct(PhysAddr(range.end.0.checked_sub(8)?))?;
    arch::bus::direct(range.start)?;
    // SAFETY: a device's registers, from its base address register; its DMA is the IOMMU's to bound.
    Some(unsafe { Mmio::new(range.start, bytes as usize) })
}

/// Grants frames for reading, whose content the hypervisor wrote for the reader.
pub fn shared(buffer: &DmaBuf) -> Grant {
    let range = buffer.range(0, buffer.words());
    // SAFETY: nothing but a channel's records and indices lives there, and those are only ever taken for numbers.
    unsafe { Grant::new(range) }
}

/// RAM of a guest: whatever is in it is the guest's, and the hypervisor believes none of it.
///
/// What the hypervisor stores there is past the caches at once: a guest begins without any, and so may a device.
pub struct GuestRam {
    buffer: DmaBuf,
    publisher: Option<Mmio>,
}

impl GuestRam {
    /// Cuts `frames` frames out of the pool, zeroed.
    pub fn new(pool: &Locked<Pool>, frames: usize) -> Option<Self> {
        Some(Self { buffer: cut(pool, frames)?, publisher: pool.with(|pool| pool.publisher) })
    }

    /// Gives the memory up. Neither its guest nor a device reaches it any more.
    pub fn into_buffer(self) -> DmaBuf {
        self.buffer
    }

    /// Returns where it lies.
    pub fn phys(&self) -> PhysAddr {
        self.buffer.phys()
    }

    /// Returns its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.buffer.words() as u64 * 8
    }

    /// Grants `bytes` bytes from the guest's address `from`, counted from the start of its RAM; `None` past its end.
    pub fn grant(&self, from: Gpa, bytes: u64) -> Option<Grant> {
        let end = from.0.checked_add(bytes).filter(|&end| end <= self.bytes())?;
        let base = self.phys().0;
        // SAFETY: guest RAM holds nothing of the hypervisor's, and stays the guest's until guest and devices are gone.
        Some(unsafe { Grant::new(PhysAddr(base + from.0)..PhysAddr(base + end)) })
    }

    /// Copies `image` to the guest's address `to`; `false` if it does not fit.
    pub fn write(&mut self, to: Gpa, image: &[u8]) -> bool {
        let fits = to.0.checked_add(image.len() as u64).is_some_and(|end| end <= self.bytes());
        if !fits || !to.0.is_multiple_of(8) {
            return false;
        }
        for (at, chunk) in (to.0 as usize / 8..).zip(image.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.buffer.store(at, u64::from_le_bytes(word));
        }
        self.publish(to, image.len().div_ceil(8));
        true
    }

    /// Writes back what was stored in the `words` words from `at`.
    fn publish(&self, at: Gpa, words: usize) {
        if let Some(publisher) = &self.publisher {
            publisher.publish(self.buffer.range(at.0 as usize / 8, words));
        }
    }

    /// Loads the aligned word at the guest's address `at`, once; `None` outside the RAM.
    pub fn load(&self, at: Gpa) -> Option<u64> {
        let inside = at.0.is_multiple_of(8) && at.0 < self.bytes();
        inside.then(|| self.buffer.load(at.0 as usize / 8))
    }

    /// Loads the `count` aligned words from the guest's address `from`, each once, as they are asked for; `None` if they are
    /// not all in the RAM.
    pub fn words(&self, from: Gpa, count: usize) -> Option<impl Iterator<Item = u64> + '_> {
        let first = usize::try_from(from.0 / 8).ok()?;
        let inside = from.0.is_multiple_of(8) && first.checked_add(count)? <= self.buffer.words();
        // None are everywhere.
        (inside || count == 0).then(|| (first..first + count).map(|at| self.buffer.load(at)))
    }

    /// Stores the aligned word at the guest's address `at`, if it is in the RAM.
    pub fn store(&mut self, at: Gpa, value: u64) {
        if at.0.is_multiple_of(8) && at.0 < self.bytes() {
            self.buffer.store(at.0 as usize / 8, value);
            self.publish(at, 1);
        }
    }
}
