//! What it costs to hand one slot index from the service core to the core of a queue's owner.

use bench::Row;
use crossbeam_queue::ArrayQueue;
use heapless::spsc;
use ringbuf::{
    HeapCons, HeapProd, HeapRb,
    traits::{Consumer as _, Producer as _, Split as _},
};
use std::hint::black_box;

/// Indices that are handed over, one after the other.
const HANDED: usize = 1_000;
const ROOM: usize = 64;

/// A ring with one index in it now and then.
trait Ring {
    fn empty() -> Self;
    fn push(&mut self, slot: u16);
    fn pop(&mut self) -> Option<u16>;
}

/// The ring that the broker uses, through the ends that it has. That a slot is in it is said by the slot's own word.
struct Ours(spsc::Producer<'static, u16>, spsc::Consumer<'static, u16>);

impl Ring for Ours {
    fn empty() -> Self {
        let ring: &'static mut spsc::Queue<u16, { ROOM + 1 }> = Box::leak(Box::new(spsc::Queue::new()));
        let (producer, consumer) = ring.split();
        Self(producer, consumer)
    }
    #[inline(always)]
    fn push(&mut self, slot: u16) {
        let _ = self.0.enqueue(slot);
    }
    #[inline(always)]
    fn pop(&mut self) -> Option<u16> {
        self.1.dequeue()
    }
}

struct Rtrb(rtrb::Producer<u16>, rtrb::Consumer<u16>);

impl Ring for Rtrb {
    fn empty() -> Self {
        let (producer, consumer) = rtrb::RingBuffer::new(ROOM);
        Self(producer, consumer)
    }
    #[inline(always)]
    fn push(&mut self, slot: u16) {
        let _ = self.0.push(slot);
    }
    #[inline(always)]
    fn pop(&mut self) -> Option<u16> {
        self.1.pop().ok()
    }
}

struct Ringbuf(HeapProd<u16>, HeapCons<u16>);

impl Ring for Ringbuf {
    fn empty() -> Self {
        let (producer, consumer) = HeapRb::new(ROOM).split();
        Self(producer, consumer)
    }
    #[inline(always)]
    fn push(&mut self, slot: u16) {
        let _ = self.0.try_push(slot);
    }
    #[inline(always)]
    fn pop(&mut self) -> Option<u16> {
        self.1.try_pop()
    }
}

impl Ring for ArrayQueue<u16> {
    fn empty() -> Self {
        ArrayQueue::new(ROOM)
    }
    #[inline(always)]
    fn push(&mut self, slot: u16) {
        let _ = ArrayQueue::push(self, slot);
    }
    #[inline(always)]
    fn pop(&mut self) -> Option<u16> {
        ArrayQueue::pop(self)
    }
}

/// One goes in, one comes out.
#[inline(always)]
fn hand_over<R: Ring>(ring: &mut R) -> usize {
    (0..HANDED)
        .filter(|&n| {
            ring.push(black_box(n as u16 % ROOM as u16));
            ring.pop().is_some()
        })
        .count()
}

/// The loop around it.
#[inline(always)]
fn nothing() -> usize {
    (0..HANDED).filter(|&n| black_box(n as u16 % ROOM as u16) < u16::MAX).count()
}

mod counted {
    use super::{ArrayQueue, Ours, Ring as _, Ringbuf, Rtrb, hand_over, nothing};
    use gungraun::{library_benchmark, library_benchmark_group};
    use std::hint::black_box;

    macro_rules! counted {
        ($($name:ident: $ring:ty,)*) => {
            $(
                #[library_benchmark]
                #[bench::one_by_one(<$ring>::empty())]
                fn $name(mut ring: $ring) -> (usize, $ring) {
                    let handed = hand_over(black_box(&mut ring));
                    (handed, ring)
                }
            )*
        };
    }

    counted! {
        ours: Ours,
        rtrb: Rtrb,
        ringbuf: Ringbuf,
        crossbeam: ArrayQueue<u16>,
    }

    #[library_benchmark]
    #[bench::one_by_one()]
    fn the_loop() -> usize {
        nothing()
    }

    library_benchmark_group!(name = all, benchmarks = [ours, rtrb, ringbuf, crossbeam, the_loop]);
    gungraun::main!(library_benchmark_groups = all);

    pub fn run() {
        main();
    }
}

const NAMES: [&str; 4] = ["ours", "rtrb", "ringbuf", "crossbeam"];

fn time<R: Ring>() -> Option<f64> {
    bench::nanoseconds(HANDED, R::empty, |ring| assert_eq!(hand_over(ring), HANDED))
}

fn main() {
    bench::tools_or_exit();
    counted::run();
    if bench::is_counted() {
        return;
    }
    let the_loop = bench::instructions("ring", "the_loop", "one_by_one", HANDED);
    let costs = NAMES.map(|name| Some(bench::instructions("ring", name, "one_by_one", HANDED)? - the_loop?));
    let what = "one slot index over".to_string();
    bench::print(
        "instructions",
        &NAMES,
        &[Row { what: what.clone(), costs: costs.into(), goal: Some(30.0) }],
    );
    let costs = vec![time::<Ours>(), time::<Rtrb>(), time::<Ringbuf>(), time::<ArrayQueue<u16>>()];
    bench::print("nanoseconds", &NAMES, &[Row { what, costs, goal: None }]);
}
