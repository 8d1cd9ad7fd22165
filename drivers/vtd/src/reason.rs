//! The manual's fault reasons ("Fault Conditions and Remapping Hardware Behavior").

use iommu::FaultReason;

macro_rules! reasons {
    ($($code:literal $class:ident $name:ident $doc:literal,)*) => {
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
        }
    };
}

// Both numberings come from one unit: some report codes of legacy mode for conditions of scalable mode.
reasons! {
    // Legacy mode.
    0x01 NotAttached RootNotPresent "LRT.2: the root entry is not present.",
    0x02 NotAttached ContextNotPresent "LCT.2: the context entry is not present.",
    0x03 BadTables ContextInvalid "LCT.4: a width, type or pointer of the context entry is not supported.",
    0x04 AddressSize BeyondWidth "LGN.1: the address is beyond what the tables or the unit can hold.",
    // A second-stage entry that is not present has neither permission and is reported as such.
    0x05 NotPermitted WriteDenied "LGN.2: no permission to write.",
    0x06 NotPermitted ReadDenied "LGN.3: no permission to read.",
    0x07 BadTables TableUnreadable "LSL.1: a second-stage table could not be read.",
    0x08 BadTables RootUnreadable "LRT.1: the root table could not be read.",
    0x09 BadTables ContextUnreadable "LCT.1: the context table could not be read.",
    0x0A BadTables RootReserved "LRT.3: the root entry has a reserved field set.",
    0x0B BadTables ContextReserved "LCT.3: the context entry has a reserved field set.",
    0x0C BadTables TableReserved "LSL.2: a second-stage entry has a reserved field set.",
    0x0D NotAttached KindBlocked "LCT.5: the context entry does not admit requests of this kind.",
    0x0E Interrupt OutputIsInterrupt "LGN.4: the tables lead to the interrupt range.",
    // Interrupt remapping.
    0x20 Interrupt InterruptReserved "An interrupt request has a reserved field set.",
    0x21 Interrupt InterruptPastTheEnd "The index is past the end of the interrupt table.",
    0x22 Interrupt InterruptNotPresent "The interrupt entry is not present.",
    0x23 Interrupt InterruptUnreadable "The interrupt table could not be read.",
    0x24 Interrupt InterruptEntryReserved "The interrupt entry has a reserved field set.",
    0x25 Interrupt CompatibilityFormat "An interrupt request of the compatibility format.",
    0x26 Interrupt WrongSource "The interrupt entry is for another source.",
    0x27 Interrupt PostedUnreadable "A posted-interrupt descriptor could not be reached.",
    0x28 Interrupt PostedReserved "A posted-interrupt descriptor has a reserved field set.",
    0x29 Interrupt InterruptKind "An interrupt request of a kind that cannot be one, such as with a PASID.",
    // Scalable mode: root table address, root, context.
    0x30 BadTables RootAddressInvalid "RTA.1: the root table address names a mode that there is not.",
    0x31 NotAttached PasidInLegacyMode "RTA.2: a request with PASID, in legacy mode.",
    0x32 NotAttached PageRequestInLegacyMode "RTA.3: a page request, in legacy mode.",
    0x38 BadTables ScalableRootUnreadable "SRT.1: the root table could not be read.",
    0x39 NotAttached ScalableRootNotPresent "SRT.2: the half of the root entry is not present.",
    0x3A BadTables ScalableRootReserved "SRT.3: the half of the root entry has a reserved field set.",
    0x40 BadTables ScalableContextUnreadable "SCT.1: the context table could not be read.",
    0x41 NotAttached ScalableContextNotPresent "SCT.2: the context entry is not present.",
    0x42 BadTables ScalableContextReserved "SCT.3: the context entry has a reserved field set.",
    0x43 BadTables ScalableContextInvalid "SCT.4: the PASID for requests without one is past the directory.",
    0x44 NotAttached TranslationBlocked "SCT.5: translation requests are not admitted (DTE).",
    0x45 NotAttached PasidBlocked "SCT.6: requests with PASID are not admitted (PASIDE).",
    0x46 NotAttached PasidPastTheEnd "SCT.7: the PASID is past the directory.",
    0x47 NotAttached PageRequestBlocked "SCT.8: page requests are not admitted (PRE).",
    0x48 BadTables RidPasidInvalid "SCT.9: the PASID for requests without one cannot be used.",
    // PASID directory and table. An entry that is all zero is reported as invalid by units that look at its type first.
    0x50 BadTables DirectoryUnreadable "SPD.1: the PASID directory could not be read.",
    0x51 NotAttached DirectoryNotPresent "SPD.2: the directory entry is not present.",
    0x52 BadTables DirectoryReserved "SPD.3: the directory entry has a reserved field set.",
    0x58 BadTables PasidUnreadable "SPT.1: the PASID table could not be read.",
    0x59 NotAttached PasidNotPresent "SPT.2: the PASID entry is not present.",
    0x5A BadTables PasidReserved "SPT.3: the PASID entry has a reserved field set.",
    0x5B NotAttached PasidInvalid "SPT.4: the type or width of the PASID entry is not supported.",
    0x5C NotPermitted ExecuteBlocked "SPT.5: requests to execute are not admitted.",
    0x5D NotPermitted SupervisorBlocked "SPT.6: requests of supervisors are not admitted (SRE).",
    // First stage, second stage.
    0x70 BadTables FirstStageUnreadable "SFS.1: a first-stage table could not be reached.",
    0x71 NotMapped FirstStageNotPresent "SFS.2: a first-stage entry is not present.",
    0x72 BadTables FirstStageReserved "SFS.3: a first-stage entry has a reserved field set.",
    0x73 BadTables FirstStageRootUnreadable "SFS.4: the top first-stage table could not be reached.",
    0x74 BadTables NestedTableBeyondWidth "SFS.5: a first-stage table is beyond what the second stage can hold.",
    0x75 BadTables NestedRootNotReadable "SFS.6: the second stage does not let the top first-stage table be read.",
    0x76 BadTables NestedTableNotReadable "SFS.7: the second stage does not let a first-stage table be read.",
    0x77 BadTables NestedTableNotWritable "SFS.8: the second stage does not let a first-stage table be written.",
    0x78 BadTables SecondStageUnreadable "SSS.1: a second-stage table could not be reached.",
    0x79 NotMapped SecondStageNotPresent "SSS.2: a second-stage entry permits nothing.",
    0x7A BadTables SecondStageReserved "SSS.3: a second-stage entry has a reserved field set.",
    0x7B BadTables SecondStageRootUnreadable "SSS.4: the top second-stage table could not be reached.",
    0x7C BadTables SecondStageNotSnooped "SSS.5: accessed and dirty bits need walks that snoop.",
    0x7D BadTables SecondStageUpdateFailed "SSS.6: accessed and dirty bits could not be updated.",
    // What is asked for.
    0x80 AddressSize NotCanonical "SGN.1: the address is not canonical.",
    0x81 NotPermitted UserDenied "SGN.2: a page of supervisors.",
    0x82 NotPermitted ExecuteDenied "SGN.3: a page that is not for execution.",
    0x83 AddressSize BeyondHost "SGN.4: the address is beyond the host's.",
    0x84 AddressSize BeyondSecondStage "SGN.5: the address is beyond what the second stage can hold.",
    0x85 NotPermitted ScalableWriteDenied "SGN.6: no permission to write.",
    0x86 NotPermitted ScalableReadDenied "SGN.7: no permission to read.",
    0x87 Interrupt ScalableOutputIsInterrupt "SGN.8: the tables lead to the interrupt range.",
    0x90 BadTables FirstStageNotSnooped "SFS.9: accessed and dirty bits need walks that snoop.",
    0x91 BadTables FirstStageUpdateFailed "SFS.10: accessed and dirty bits could not be updated.",
}
