//! Enumerations whose numbers travel between hypervisor and guest.

/// Declares an enumeration by its numbers, with the way back from a number and a list for the C header.
macro_rules! numbered {
    ($(#[$outer:meta])* pub enum $name:ident { $($(#[doc = $doc:literal])* $variant:ident = $number:literal,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        #[repr(u64)]
        pub enum $name { $($(#[doc = $doc])* $variant = $number,)* }

        impl $name {
            /// Each number with its name and what is said about it, line by line.
            pub const ALL: &[(&str, u64, &[&str])] =
                &[$((stringify!($variant), $number, &[$($doc),*]),)*];

            /// Returns what `number` stands for, if it stands for anything.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}
