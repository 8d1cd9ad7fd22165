//! The other flavour of queue: what nobody waits for an answer to, and may be lost.

use crate::counters::count;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Relaxed},
};
use heapless::spsc::{Consumer, Producer};

/// Counts of events that found no room. One for each events queue, shared by both of its ends.
#[derive(Debug)]
pub struct Lost(AtomicU64);

impl Default for Lost {
    fn default() -> Self {
        Self::new()
    }
}

impl Lost {
    /// None.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
}

/// The service core's end of a queue of events.
pub struct EventSender<'l, T> {
    ring: Producer<'l, T>,
    lost: &'l Lost,
}

/// The owner's end of a queue of events.
pub struct EventReceiver<'l, T> {
    ring: Consumer<'l, T>,
    lost: &'l Lost,
}

/// Makes the ends of a queue of events from those of a ring.
pub const fn events<'l, T>(
    producer: Producer<'l, T>,
    consumer: Consumer<'l, T>,
    lost: &'l Lost,
) -> (EventSender<'l, T>, EventReceiver<'l, T>) {
    (EventSender { ring: producer, lost }, EventReceiver { ring: consumer, lost })
}

impl<T> EventSender<'_, T> {
    /// Sends an event; if there is no room it is lost, and counted. Never waits.
    pub fn send(&mut self, event: T) {
        if self.ring.enqueue(event).is_err() {
            count(&self.lost.0);
        }
    }

    /// Counts one event as lost that the sender never had. Where nobody knows how many there were, it is at least one.
    pub fn lose(&mut self) {
        count(&self.lost.0);
    }
}

impl<T> EventReceiver<'_, T> {
    /// Takes the next event.
    pub fn receive(&mut self) -> Option<T> {
        self.ring.dequeue()
    }

    /// Returns how many events were lost since this was asked last. Those that are still in the ring came before them.
    pub fn take_lost(&mut self) -> u64 {
        self.lost.0.swap(0, AcqRel)
    }

    /// Returns how many events were lost since `take_lost`.
    pub fn lost(&self) -> u64 {
        self.lost.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heapless::spsc;

    #[test]
    fn events_that_find_no_room_are_counted_and_the_others_keep_their_order() {
        let mut ring = spsc::Queue::<u32, 4>::new();
        let (producer, consumer) = ring.split();
        let lost = Lost::new();
        let (mut sender, mut receiver) = events(producer, consumer, &lost);

        (0..5).for_each(|event| sender.send(event));
        assert_eq!(receiver.take_lost(), 2);
        assert_eq!(core::iter::from_fn(|| receiver.receive()).collect::<std::vec::Vec<_>>(), [0, 1, 2]);
        sender.send(9);
        assert_eq!((receiver.receive(), receiver.lost()), (Some(9), 0));
        sender.lose();
        assert_eq!((receiver.receive(), receiver.take_lost()), (None, 1));
    }
}
