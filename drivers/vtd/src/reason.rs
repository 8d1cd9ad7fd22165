//! The manual's fault reasons ("Fault Conditions and Remapping Hardware Behavior").

use iommu::{FaultReason, Stages};

macro_rules! reasons {
    ($($code:literal $class:ident $stages:ident $name:ident $doc:literal,)*) => {
        /// Why the unit refused a request, as the manual tells it.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        #[non_exhaustive]
        pub enum Reason {
            $(#[doc = $doc] $name,)*
            /// A code that the sources do not explain, or that is newer than this driver.
            Other(u16),
        }

        impl Reason {
            /// Returns the reason that `code` stands for (`FR`).
            pub const fn of(code: u16) -> Self {
                match code {
                    $($code => Self::$name,)*
                    _ => Self::Other(code),
                }
            }

            /// Returns the manual's code (`FR`).
            pub const fn code(self) -> u16 {
                match self {
                    $(Self::$name => $code,)*
                    Self::Other(code) => code,
                }
            }

            /// Returns what an owner can do about it.
            pub const fn class(self) -> FaultReason {
                match self {
                    $(Self::$name => FaultReason::$class,)*
                    Self::Other(_) => FaultReason::Other,
                }
            }

            /// Returns which tables refused the request: [`Stages::None`] if none did, [`Stages::Nested`] where it was one
            /// of both and the unit does not say which.
            ///
            /// Of a code that the sources do not explain it was the second stage: the one that is no guest's.
            pub const fn stages(self) -> Stages {
                match self {
                    $(Self::$name => Stages::$stages,)*
                    Self::Other(_) => Stages::Second,
                }
            }
        }
    };
}

// Both numberings come from one unit: some report codes of legacy mode for conditions of scalable mode.
reasons! {
    // Legacy mode.
    0x01 NotAttached None RootNotPresent "LRT.2: the root entry is not present.",
    0x02 NotAttached None ContextNotPresent "LCT.2: the context entry is not present.",
    0x03 BadTables None ContextInvalid "LCT.4: a width, type or pointer of the context entry is not supported.",
    0x04 AddressSize Second BeyondWidth "LGN.1: the address is beyond what the tables or the unit can hold.",
    // A second-stage entry that is not present has neither permission and is reported as such.
    0x05 NotPermitted Second WriteDenied "LGN.2: no permission to write.",
    0x06 NotPermitted Second ReadDenied "LGN.3: no permission to read.",
    0x07 BadTables Second TableUnreadable "LSL.1: a second-stage table could not be read.",
    0x08 BadTables None RootUnreadable "LRT.1: the root table could not be read.",
    0x09 BadTables None ContextUnreadable "LCT.1: the context table could not be read.",
    0x0A BadTables None RootReserved "LRT.3: the root entry has a reserved field set.",
    0x0B BadTables None ContextReserved "LCT.3: the context entry has a reserved field set.",
    0x0C BadTables Second TableReserved "LSL.2: a second-stage entry has a reserved field set.",
    0x0D NotAttached None KindBlocked "LCT.5: the context entry does not admit requests of this kind.",
    0x0E Interrupt Second OutputIsInterrupt "LGN.4: the tables lead to the interrupt range.",
    // Interrupt remapping.
    0x20 Interrupt None InterruptReserved "An interrupt request has a reserved field set.",
    0x21 Interrupt None InterruptPastTheEnd "The index is past the end of the interrupt table.",
    0x22 Interrupt None InterruptNotPresent "The interrupt entry is not present.",
    0x23 Interrupt None InterruptUnreadable "The interrupt table could not be read.",
    0x24 Interrupt None InterruptEntryReserved "The interrupt entry has a reserved field set.",
    0x25 Interrupt None CompatibilityFormat "An interrupt request of the compatibility format.",
    0x26 Interrupt None WrongSource "The interrupt entry is for another source.",
    0x27 Interrupt None PostedUnreadable "A posted-interrupt descriptor could not be reached.",
    0x28 Interrupt None PostedReserved "A posted-interrupt descriptor has a reserved field set.",
    0x29 Interrupt None InterruptKind "An interrupt request of a kind that cannot be one, such as with a PASID.",
    // Scalable mode: root table address, root, context.
    0x30 BadTables None RootAddressInvalid "RTA.1: the root table address names a mode that there is not.",
    0x31 NotAttached None PasidInLegacyMode "RTA.2: a request with PASID, in legacy mode.",
    0x32 NotAttached None PageRequestInLegacyMode "RTA.3: a page request, in legacy mode.",
    0x33 NotAttached None AbortMode "RTA.4: all DMA is aborted (TTM = 3).",
    0x34 NotPermitted None ExecuteRequested "RTA.5: a request to execute, which units of version 8 have no more.",
    0x38 BadTables None ScalableRootUnreadable "SRT.1: the root table could not be read.",
    0x39 NotAttached None ScalableRootNotPresent "SRT.2: the half of the root entry is not present.",
    0x3A BadTables None ScalableRootReserved "SRT.3: the half of the root entry has a reserved field set.",
    0x40 BadTables None ScalableContextUnreadable "SCT.1: the context table could not be read.",
    0x41 NotAttached None ScalableContextNotPresent "SCT.2: the context entry is not present.",
    0x42 BadTables None ScalableContextReserved "SCT.3: the context entry has a reserved field set.",
    0x43 BadTables None ScalableContextInvalid "SCT.4: the PASID for requests without one is past the directory.",
    0x44 NotAttached None TranslationBlocked "SCT.5: translation requests are not admitted (DTE).",
    0x45 NotAttached None PasidBlocked "SCT.6: requests with PASID are not admitted (PASIDE).",
    0x46 NotAttached None PasidPastTheEnd "SCT.7: the PASID is past the directory.",
    0x47 NotAttached None PageRequestBlocked "SCT.8: page requests are not admitted (PRE).",
    0x48 BadTables None RidPasidInvalid "SCT.9: the PASID for requests without one cannot be used.",
    0x49 NotAttached None TranslatedPasidBlocked "SCT.10: translated requests with PASID are not admitted (EPTR).",
    // PASID directory and table. An entry that is all zero is reported as invalid by units that look at its type first.
    0x50 BadTables None DirectoryUnreadable "SPD.1: the PASID directory could not be read.",
    0x51 NotAttached None DirectoryNotPresent "SPD.2: the directory entry is not present.",
    0x52 BadTables None DirectoryReserved "SPD.3: the directory entry has a reserved field set.",
    0x58 BadTables None PasidUnreadable "SPT.1: the PASID table could not be read.",
    0x59 NotAttached None PasidNotPresent "SPT.2: the PASID entry is not present.",
    0x5A BadTables None PasidReserved "SPT.3: the PASID entry has a reserved field set.",
    0x5B NotAttached None PasidInvalid "SPT.4: the type or width of the PASID entry is not supported.",
    0x5C NotPermitted None ExecuteBlocked "SPT.5: requests to execute are not admitted.",
    0x5D NotPermitted None SupervisorBlocked "SPT.6: requests of supervisors are not admitted (SRE).",
    // First stage, second stage; what the second says of a first-stage table is SFS.6 to SFS.8, or as of any page.
    0x70 BadTables First FirstStageUnreadable "SFS.1: a first-stage table could not be reached.",
    0x71 NotMapped First FirstStageNotPresent "SFS.2: a first-stage entry is not present.",
    0x72 BadTables First FirstStageReserved "SFS.3: a first-stage entry has a reserved field set.",
    0x73 BadTables First FirstStageRootUnreadable "SFS.4: the top first-stage table could not be reached.",
    0x74 BadTables First NestedBeyondWidth "SFS.5: an address in a first-stage entry is beyond the second stage.",
    0x75 BadTables Second NestedRootNotReadable "SFS.6: the second stage does not let the top first-stage table be read.",
    0x76 BadTables Second NestedTableNotReadable "SFS.7: the second stage does not let a first-stage table be read.",
    0x77 BadTables Second NestedTableNotWritable "SFS.8: the second stage does not let a first-stage table be written.",
    0x78 BadTables Second SecondStageUnreadable "SSS.1: a second-stage table could not be reached.",
    0x79 NotMapped Second SecondStageNotPresent "SSS.2: a second-stage entry permits nothing.",
    0x7A BadTables Second SecondStageReserved "SSS.3: a second-stage entry has a reserved field set.",
    0x7B BadTables Second SecondStageRootUnreadable "SSS.4: the top second-stage table could not be reached.",
    0x7C BadTables Second SecondStageNotSnooped "SSS.5: accessed and dirty bits need walks that snoop.",
    0x7D BadTables Second SecondStageUpdateFailed "SSS.6: accessed and dirty bits could not be updated.",
    // What is asked for.
    0x80 AddressSize First NotCanonical "SGN.1: the address is not canonical.",
    0x81 NotPermitted First UserDenied "SGN.2: a page of supervisors.",
    0x82 NotPermitted Second ExecuteDenied "SGN.3: a page that is not for execution; newer manuals have it no more.",
    0x83 AddressSize None BeyondHost "SGN.4: the address is beyond the host's.",
    0x84 AddressSize Second BeyondSecondStage "SGN.5: the address is beyond what the second stage can hold.",
    0x85 NotPermitted Nested ScalableWriteDenied "SGN.6: no permission to write, of either stage.",
    0x86 NotPermitted Second ScalableReadDenied "SGN.7: no permission to read, which first-stage entries always give.",
    0x87 Interrupt Second ScalableOutputIsInterrupt "SGN.8: what all tables together lead to is in the interrupt range.",
    0x89 NotAttached None PasidBeyondUnit "SGN.10: the PASID is past what the unit has.",
    0x90 BadTables First FirstStageNotSnooped "SFS.9: accessed and dirty bits need walks that snoop.",
    0x91 BadTables First FirstStageUpdateFailed "SFS.10: accessed and dirty bits could not be updated.",
}
