//! Fields of wide descriptors, written with the bit numbers of the manual.

use core::marker::PhantomData;

/// A descriptor in memory: little-endian 64-bit words, bit 0 first.
pub trait Words: Sized {
    /// The words, least significant first.
    fn words(&self) -> &[u64];
    /// The words, least significant first.
    fn words_mut(&mut self) -> &mut [u64];

    /// Returns the value of `field`.
    fn get(&self, field: Field<Self>) -> u64 {
        (self.words()[field.word] >> field.shift) & field.mask
    }

    /// Returns whether any bit of `field` is set.
    fn is_set(&self, field: Field<Self>) -> bool {
        self.get(field) != 0
    }

    /// Returns `self` with `field` set to the low bits of `value`; bits that do not fit are cut off.
    ///
    /// Callers hold types that fit (`Pasid`, `DomainId`, aligned addresses), so nothing is lost; a value that a
    /// guest or hardware had a hand in must not be able to panic here.
    fn with(mut self, field: Field<Self>, value: u64) -> Self {
        debug_assert!(value <= field.mask, "value too wide for its field");
        let word = &mut self.words_mut()[field.word];
        *word = (*word & !(field.mask << field.shift)) | ((value & field.mask) << field.shift);
        self
    }

    /// Returns `self` with the bits of `address` that `field` covers, at the places where they are.
    ///
    /// Manuals draw an address field as bits `[63:12]` and mean the address with its low bits zero.
    fn with_address(mut self, field: Field<Self>, address: u64) -> Self {
        let kept = field.mask << field.shift;
        let word = &mut self.words_mut()[field.word];
        *word = (*word & !kept) | (address & kept);
        self
    }

    /// Returns the address that `field` covers, its low bits zero.
    fn address(&self, field: Field<Self>) -> u64 {
        self.words()[field.word] & (field.mask << field.shift)
    }
}

/// Bits `[hi:lo]` of a `T`, numbered over the whole descriptor as in the manual.
pub struct Field<T: ?Sized> {
    word: usize,
    shift: u32,
    mask: u64,
    _of: PhantomData<fn(&T)>,
}

impl<T: ?Sized> Clone for Field<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: ?Sized> Copy for Field<T> {}

impl<T: ?Sized> Field<T> {
    /// Bits `[hi:lo]`; both lie in the same 64-bit word.
    pub const fn bits(hi: u32, lo: u32) -> Self {
        assert!(lo <= hi && hi / 64 == lo / 64, "a field lies within one word");
        Self {
            word: (lo / 64) as usize,
            shift: lo % 64,
            mask: u64::MAX >> (63 - (hi - lo)),
            _of: PhantomData,
        }
    }

    /// Returns the number of the lowest bit, over the whole descriptor.
    pub const fn lowest(self) -> u32 {
        self.word as u32 * 64 + self.shift
    }

    /// Returns the number of bits.
    pub const fn width(self) -> u32 {
        self.mask.count_ones()
    }

    /// Returns the words of a descriptor in which the field is all ones and everything else zero.
    ///
    /// PANICS: where the descriptor has more than `N` words; meant for constants.
    pub const fn bits_of<const N: usize>(self) -> [u64; N] {
        let mut words = [0; N];
        words[self.word] = self.mask << self.shift;
        words
    }

    /// The single bit `[at]`.
    pub const fn bit(at: u32) -> Self {
        Self::bits(at, at)
    }
}

/// Declares a newtype over `[u64; N]` that implements [`Words`].
#[macro_export]
macro_rules! descriptor {
    ($(#[$meta:meta])* pub struct $name:ident([u64; $n:literal]);) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        pub struct $name(pub [u64; $n]);

        impl $crate::Words for $name {
            fn words(&self) -> &[u64] {
                &self.0
            }
            fn words_mut(&mut self) -> &mut [u64] {
                &mut self.0
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    descriptor! {
        /// A descriptor to test with.
        pub struct Example([u64; 2]);
    }
    const LOW: Field<Example> = Field::bits(7, 4);
    const HIGH: Field<Example> = Field::bits(127, 64);
    const ADDRESS: Field<Example> = Field::bits(63, 12);

    #[test]
    fn fields_are_numbered_over_the_whole_descriptor() {
        let example = Example::default().with(LOW, 0xA).with(HIGH, u64::MAX);

        assert_eq!(example, Example([0xA0, u64::MAX]));
        assert_eq!(example.get(LOW), 0xA);
        assert_eq!(example.with(LOW, 0), Example([0, u64::MAX]));
    }

    #[test]
    fn a_field_knows_its_place() {
        assert_eq!((LOW.lowest(), LOW.width(), LOW.bits_of()), (4, 4, [0xF0, 0]));
        assert_eq!((HIGH.lowest(), HIGH.width(), HIGH.bits_of()), (64, 64, [0, u64::MAX]));
        assert_eq!((ADDRESS.lowest(), ADDRESS.width()), (12, 52));
    }

    #[test]
    fn an_address_keeps_its_place() {
        let example = Example([0xFFF, 0]).with_address(ADDRESS, 0x1234_5FFF);

        assert_eq!(example, Example([0x1234_5FFF, 0]));
        assert_eq!(example.address(ADDRESS), 0x1234_5000);
    }
}
