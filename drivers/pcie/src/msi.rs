//! Message-signalled interrupts (MSI): the messages of a function, and whether it sends them.

use crate::{ConfigSpace, Error, Function};
use iommu::Message;

/// `MSI Enable` of the Message Control register, which is the upper half of the capability's first word.
const ENABLE: u32 = 1 << 16;
/// `Multiple Message Capable`, log2, of the same.
const CAPABLE_SHIFT: u32 = 17;
/// `Multiple Message Enable`, log2, of the same.
const ENABLED_SHIFT: u32 = 20;
/// `64 Bit Address Capable` of the same.
const WIDE: u32 = 1 << 23;
/// `Per-vector Masking Capable` of the same.
const MASKS: u32 = 1 << 24;
/// The most messages that a function can have, log2.
const MOST: u8 = 5;

const NAME: &str = "MSI capability";

impl Function {
    /// Returns how many messages the function can send, as a power of two, 0 to 5.
    pub fn messages(&self, config: &impl ConfigSpace) -> Result<u8, Error> {
        let at = self.needed(self.msi, NAME)?;
        Ok(((self.read(config, at)? >> CAPABLE_SHIFT) as u8 & 7).min(MOST))
    }

    /// Lets the function send 2^`log2` messages, of which number n writes `first` with n added to its data.
    ///
    /// As a bus master alone: a message is a write. Where interrupts are remapped, the unit's table has to know it before.
    pub fn enable_messages(&self, config: &impl ConfigSpace, first: Message, log2: u8) -> Result<(), Error> {
        let at = self.needed(self.msi, NAME)?;
        let control = self.read(config, at)?;
        let wide = control & WIDE != 0;
        let (low, high) = (first.address as u32, (first.address >> 32) as u32);
        // The number takes the place of the lowest bits of the data.
        let fits = log2 <= self.messages(config)?
            && first.data <= 0xFFFF
            && first.data & ((1 << log2) - 1) == 0
            && (wide || high == 0);
        if !fits {
            return Err(Error::Unsupported { function: self.id, capability: "MSI of this message" });
        }
        self.disable_messages(config);
        config.write32(self.id, at + 4, low);
        if wide {
            config.write32(self.id, at + 8, high);
        }
        let data = if wide { 12 } else { 8 };
        config.write32(self.id, at + data, first.data);
        if control & MASKS != 0 {
            config.write32(self.id, at + data + 4, 0);
        }
        config.write32(self.id, at, ENABLE | u32::from(log2) << ENABLED_SHIFT);
        match self.read(config, at)? & ENABLE {
            0 => Err(Error::Rejected { function: self.id, capability: NAME }),
            _ => Ok(()),
        }
    }

    /// Lets the function send no messages, if it has any.
    pub fn disable_messages(&self, config: &impl ConfigSpace) {
        if let Some(at) = self.msi {
            config.write32(self.id, at, 0);
            // The read makes the posted write arrive before the message is changed.
            let _ = config.read32(self.id, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::StreamId;
    use std::{cell::RefCell, collections::BTreeMap, vec, vec::Vec};

    const DEVICE: StreamId = StreamId(0x20);
    const AT: u16 = 0x50;

    /// One function with an MSI capability at 0x50, and the order of writes.
    struct Space {
        words: RefCell<BTreeMap<u16, u32>>,
        writes: RefCell<Vec<(u16, u32)>>,
        /// The bits of Message Control that are written and kept.
        kept: u32,
    }

    impl Space {
        /// `control` are the capability bits of Message Control.
        fn new(control: u32) -> Self {
            let words = [(0x00, 0x5A5A_1B36), (0x04, 0x0010_0000), (0x34, 0x50), (AT, control << 16 | 0x05)];
            Self { words: RefCell::new(words.into()), writes: RefCell::default(), kept: 0x0071_0000 }
        }
    }

    impl ConfigSpace for Space {
        fn read32(&self, _: StreamId, offset: u16) -> u32 {
            *self.words.borrow().get(&offset).unwrap_or(&0)
        }
        fn write32(&self, _: StreamId, offset: u16, value: u32) {
            self.writes.borrow_mut().push((offset, value));
            let kept = if offset == AT { self.kept } else { u32::MAX };
            let before = self.words.borrow().get(&offset).copied().unwrap_or(0);
            self.words.borrow_mut().insert(offset, before & !kept | value & kept);
        }
    }

    fn enable(space: &Space, message: Message, log2: u8) -> Result<(), Error> {
        Function::find(space, DEVICE).expect("it answers").enable_messages(space, message, log2)
    }

    /// PCIe facts, section 9: 64-bit form has its data at 0xC, the other at 8; masks follow.
    #[test]
    fn a_message_is_whole_before_it_is_enabled() {
        let message = Message { address: 0xFEE0_00B8, data: 0x40 };
        for (control, between) in [
            (0x00, vec![(AT + 4, 0xFEE0_00B8), (AT + 8, 0x40)]),
            (0x80, vec![(AT + 4, 0xFEE0_00B8), (AT + 8, 0), (AT + 12, 0x40)]),
            (0x180, vec![(AT + 4, 0xFEE0_00B8), (AT + 8, 0), (AT + 12, 0x40), (AT + 16, 0)]),
        ] {
            let space = Space::new(control);

            assert_eq!(enable(&space, message, 0), Ok(()));

            let writes = space.writes.borrow();
            assert_eq!(writes.first(), Some(&(AT, 0)), "off while it changes");
            assert_eq!(writes[1..writes.len() - 1], between);
            assert_eq!(writes.last(), Some(&(AT, 1 << 16)));
        }
    }

    #[test]
    fn several_messages_are_enabled_as_far_as_the_function_has_them() {
        // Multiple Message Capable 3: eight.
        let space = Space::new(0x86);
        let function = Function::find(&space, DEVICE).expect("it answers");
        assert_eq!(function.messages(&space), Ok(3));

        assert_eq!(enable(&space, Message { address: 0xFEE0_0018, data: 8 }, 3), Ok(()));
        assert_eq!(space.writes.borrow().last(), Some(&(AT, 3 << 20 | 1 << 16)));

        assert!(enable(&space, Message { address: 0xFEE0_0018, data: 0 }, 4).is_err());
    }

    #[test]
    fn a_message_that_the_function_cannot_send_changes_nothing() {
        let space = Space::new(0x06);
        for (address, data, log2) in
            [(0x1_FEE0_0000, 0, 0), (0xFEE0_0000, 0x1_0000, 0), (0xFEE0_0000, 4, 3), (0xFEE0_0000, 1, 1)]
        {
            assert!(
                enable(&space, Message { address, data }, log2).is_err(),
                "{address:#x} {data:#x} {log2}"
            );
        }
        assert!(space.writes.borrow().is_empty());
        let none = Space::new(0);
        none.words.borrow_mut().insert(0x04, 0);
        assert!(matches!(enable(&none, Message { address: 0, data: 0 }, 0), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn a_function_that_does_not_enable_its_messages_is_told_of() {
        let space = Space { kept: 0, ..Space::new(0x80) };

        let told = enable(&space, Message { address: 0xFEE0_0000, data: 0 }, 0);

        assert_eq!(told, Err(Error::Rejected { function: DEVICE, capability: NAME }));
    }
}
