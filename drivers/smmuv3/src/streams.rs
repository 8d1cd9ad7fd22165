//! The stream table: where the entry of each stream is.
//!
//! It is linear, or has two levels: then an entry of the first level covers as many streams as a table of the
//! second level holds, and points at one only where a stream is served. The unit may read either level at any
//! time, word by word, so a table of the second level is whole before the one store that leads to it; until
//! then the unit reports `C_BAD_STREAMID` for its streams.
//!
//! A table of the second level serves its streams for as long as the unit is in service.

use heapless::Vec;
use iommu::{Bus, DmaBuf, Error, Field, PhysAddr, StreamId, Words, descriptor};

/// Tables of the second level, at most: one for each device that can be assigned.
pub const SECOND_LEVEL_TABLES: usize = crate::tables::DEVICES;
/// Words of a stream table entry.
pub(crate) const STREAM_WORDS: usize = 8;
/// Log2 of the entries that a table of the second level may have (`STRTAB_BASE_CFG.SPLIT`).
const SPLITS: [u32; 3] = [6, 8, 10];
/// Log2 of the entries that a linear table has at most where the unit could have two levels: 16 KiB.
const LINEAR_LOG2: u32 = 8;
/// Log2 of the streams of a PCI bus.
const BUS_LOG2: u32 = 8;

descriptor! {
    /// An entry of the first level of a stream table (`L1STD`).
    pub struct FirstLevelEntry([u64; 1]);
}

impl FirstLevelEntry {
    const SPAN: Field<Self> = Field::bits(4, 0);
    const TABLE: Field<Self> = Field::bits(55, 6);

    /// Leads to the 2^`split` stream table entries at `table`.
    pub fn new(table: PhysAddr, split: u32) -> Self {
        Self::default().with(Self::SPAN, u64::from(split) + 1).with_address(Self::TABLE, table.0)
    }
}

/// How much memory a stream table takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StreamTableNeeds {
    /// Words of [`Memory::stream_table`](crate::Memory::stream_table).
    pub words: usize,
    /// Words of each table of [`Memory::second_level`](crate::Memory::second_level); 0 where the table is
    /// linear.
    pub second_level_words: usize,
}

impl StreamTableNeeds {
    /// For 2^`log2` streams of a unit.
    ///
    /// A table of the second level is one for each PCI bus, unless the first level then takes more than a
    /// frame.
    pub(crate) fn new(log2: u32, two_levels: bool) -> Self {
        if !two_levels || log2 <= LINEAR_LOG2 {
            return Self { words: STREAM_WORDS << log2, second_level_words: 0 };
        }
        let frame_log2 = crate::FRAME_WORDS.ilog2();
        let split = if log2 - BUS_LOG2 <= frame_log2 { BUS_LOG2 } else { SPLITS[2] };
        // STRTAB_BASE names places of 64 bytes.
        let words = 1usize << (log2 - split);
        Self { words: words.max(STREAM_WORDS), second_level_words: STREAM_WORDS << split }
    }
}

/// The second level of a stream table.
#[derive(Debug)]
struct SecondLevel {
    /// Log2 of the entries of one table.
    split: u32,
    tables: Vec<DmaBuf, SECOND_LEVEL_TABLES>,
    /// The place in the first level that leads to the table of the same number; those of later tables are
    /// free.
    places: Vec<u32, SECOND_LEVEL_TABLES>,
}

impl SecondLevel {
    /// Returns the table that serves `stream`, by number.
    fn table(&self, stream: StreamId) -> Option<usize> {
        self.places.iter().position(|&place| place == stream.0 >> self.split)
    }
}

/// A stream table.
#[derive(Debug)]
pub(crate) struct StreamTable {
    /// All entries, or the first level.
    first: DmaBuf,
    second: Option<SecondLevel>,
    /// Streams that have a place.
    streams: u64,
}

impl StreamTable {
    /// Checks the memory of a stream table: without tables for a second level it is linear.
    pub(crate) fn new(first: DmaBuf, tables: Vec<DmaBuf, SECOND_LEVEL_TABLES>) -> Result<Self, Error> {
        const FIRST: &str = "the stream table";
        const SECOND: &str = "second-level stream tables";
        let Some(table) = tables.first() else {
            let log2 = crate::entries_log2(FIRST, &first, STREAM_WORDS, 32)?;
            return Ok(Self { first, second: None, streams: 1 << log2 });
        };
        let words = table.words();
        let split = SPLITS.into_iter().find(|&split| STREAM_WORDS << split == words);
        let Some(split) = split else {
            let needed = SPLITS.map(|split| STREAM_WORDS << split);
            let next = needed.into_iter().find(|&needed| needed >= words).unwrap_or(needed[2]);
            return Err(Error::Memory { purpose: SECOND, words, needed: next });
        };
        for table in &tables {
            crate::aligned(SECOND, table, words)?;
            if table.words() != words {
                return Err(Error::Memory { purpose: SECOND, words: table.words(), needed: words });
            }
        }
        crate::aligned(FIRST, &first, STREAM_WORDS)?;
        let log2 = crate::entries_log2(FIRST, &first, 1, 32 - split)? + split;
        let second = SecondLevel { split, tables, places: Vec::new() };
        Ok(Self { first, second: Some(second), streams: 1 << log2 })
    }

    /// Zeroes all of it: no stream has a valid entry.
    pub(crate) fn clear(&mut self, bus: &impl Bus) {
        let second = self.second.iter_mut().flat_map(|second| second.tables.iter_mut());
        for table in core::iter::once(&mut self.first).chain(second) {
            table.clear();
            bus.publish(table.range(0, table.words()));
        }
    }

    /// Returns where it is.
    pub(crate) fn phys(&self) -> PhysAddr {
        self.first.phys()
    }

    /// Returns log2 of the streams that have a place.
    pub(crate) fn log2(&self) -> u32 {
        self.streams.ilog2()
    }

    /// Returns the number of streams that have a place.
    pub(crate) fn streams(&self) -> u64 {
        self.streams
    }

    /// Returns log2 of the entries of a table of the second level, or `None` where there is one level.
    pub(crate) fn split(&self) -> Option<u32> {
        self.second.as_ref().map(|second| second.split)
    }

    /// Sees that `stream` has an entry. One that is new is zero.
    ///
    /// The unit may remember that there was none until the configuration of `stream` has been invalidated.
    pub(crate) fn reach(&mut self, bus: &impl Bus, stream: StreamId) -> Result<(), Error> {
        if u64::from(stream.0) >= self.streams {
            return Err(Error::UnknownStream { stream });
        }
        let Some(second) = &mut self.second else { return Ok(()) };
        if second.table(stream).is_some() {
            return Ok(());
        }
        let place = stream.0 >> second.split;
        let exhausted = Error::Exhausted { what: "second-level stream tables" };
        let table = second.tables.get(second.places.len()).ok_or(exhausted)?.phys();
        second.places.push(place).map_err(|_| exhausted)?;
        // ORDER: the table was published when it was cleared; one store leads to it.
        let entry = FirstLevelEntry::new(table, second.split);
        self.first.store(place as usize, entry.0[0]);
        bus.publish(self.first.range(place as usize, 1));
        Ok(())
    }

    /// Returns one word of the entry of `stream`, as it was stored last; zero where there is none.
    pub(crate) fn load(&self, stream: StreamId, word: usize) -> u64 {
        match &self.second {
            None => self.first.load(stream.0 as usize * STREAM_WORDS + word),
            Some(second) => {
                let at = stream.0 & ((1 << second.split) - 1);
                let table = second.table(stream).and_then(|n| second.tables.get(n));
                table.map_or(0, |table| table.load(at as usize * STREAM_WORDS + word))
            }
        }
    }

    /// Stores one word of the entry of `stream`, visible before any later store. Streams without an entry
    /// have no words.
    pub(crate) fn store(&mut self, bus: &impl Bus, stream: StreamId, word: usize, value: u64) {
        let (table, at) = match &mut self.second {
            None => (&mut self.first, stream.0 as usize),
            Some(second) => {
                let at = stream.0 & ((1 << second.split) - 1);
                let Some(table) = second.table(stream).and_then(|n| second.tables.get_mut(n)) else { return };
                (table, at as usize)
            }
        };
        let at = at * STREAM_WORDS + word;
        table.store(at, value);
        bus.publish(table.range(at, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows L1 and L2 of facts/smmuv3.md, section 11.3; a full table of 1024 entries has Span 11.
    #[test]
    fn a_first_level_entry_holds_the_word_of_the_manual() {
        assert_eq!(FirstLevelEntry::new(PhysAddr(0x8800_4000), 8).0, [0x0000_0000_8800_4009]);
        assert_eq!(FirstLevelEntry::new(PhysAddr(0x8800_5000), 6).0, [0x0000_0000_8800_5007]);
        assert_eq!(FirstLevelEntry::new(PhysAddr(0x00FF_FFFF_FFFF_0000), 10).0, [0x00FF_FFFF_FFFF_000B]);
    }

    #[test]
    fn few_streams_make_a_linear_table_and_many_make_two_levels() {
        for (log2, two_levels, words, second_level_words) in [
            (0, true, 8, 0),
            (6, false, 512, 0),
            (8, true, 2048, 0),
            // As many as a unit of one level may have, and more than that.
            (16, false, 524_288, 0),
            // 2 places, of which STRTAB_BASE can name no fewer than 8.
            (9, true, 8, 2048),
            (16, true, 256, 2048),
            (17, true, 512, 2048),
            (18, true, 256, 8192),
            (32, true, 1 << 22, 8192),
        ] {
            let needs = StreamTableNeeds { words, second_level_words };
            assert_eq!(StreamTableNeeds::new(log2, two_levels), needs, "2^{log2} streams");
        }
    }
}
