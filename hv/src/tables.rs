//! The tables that translate what a device issues, in the stage that the unit has for it.

use crate::{memory, wanted};
use arch::unit;
use iommu::{Capabilities, FirstStage, Grant, PAGE_SIZE, Perms, Translation};
use pgtable::{Attributes, Error, Format, Frames, Gather, Limits, Memory, Retired, Tree};

/// A stage of translation.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub enum Stage {
    /// The first: what a device issues with a PASID goes through it alone.
    First,
    /// The second.
    Second,
}

impl Stage {
    /// Returns the stage by which devices are translated: the first where there is one, unless the command line says
    /// `stage=2` and there is a second.
    pub fn of(capabilities: &Capabilities, command_line: &str) -> Self {
        let asked = wanted::value(command_line, "stage") == Some("2");
        if capabilities.stage1 && !(asked && capabilities.stage2) { Self::First } else { Self::Second }
    }
}

/// Tables of one stage.
pub enum DeviceTables {
    /// Of the first.
    First(Tree<unit::FirstStage>),
    /// Of the second.
    Second(Tree<unit::SecondStage>),
}

impl DeviceTables {
    /// Makes empty tables with frames of `frames`.
    pub fn new(frames: &mut impl Frames, stage: Stage) -> Result<Self, Error> {
        // Pages alone: a guest may take back any page of what it lent.
        Ok(match stage {
            Stage::First => Self::First(Tree::new(frames, Limits::PAGES)?),
            Stage::Second => Self::Second(Tree::new(frames, Limits::PAGES)?),
        })
    }

    /// Makes second-stage tables in which `memory` is a guest's, from its address 0 on.
    pub fn of_guest(frames: &mut impl Frames, memory: &Grant) -> Result<Self, Error> {
        let tree = Tree::new(frames, Limits::PAGES)?;
        match tree.map(frames, 0, memory, Perms::READ_WRITE) {
            Ok(()) => Ok(Self::Second(tree)),
            Err(error) => {
                tree.take_down(frames);
                Err(error)
            }
        }
    }

    /// Names the tables for the unit as what is behind a first stage that a guest owns.
    pub fn behind(&self, first: FirstStage) -> Translation {
        match self {
            Self::First(tree) => Translation::Nested { first, second: memory::root(tree) },
            Self::Second(tree) => Translation::Nested { first, second: memory::root(tree) },
        }
    }

    /// Names the tables for the unit.
    pub fn translation(&self) -> Translation {
        match self {
            Self::First(tree) => Translation::Stage1(memory::root(tree)),
            Self::Second(tree) => Translation::Stage2(memory::root(tree)),
        }
    }

    /// Maps `grant` at `iova`.
    pub fn map(&self, frames: &mut impl Frames, iova: u64, grant: &Grant, perms: Perms) -> Result<(), Error> {
        match self {
            Self::First(tree) => tree.map(frames, iova, grant, perms),
            Self::Second(tree) => tree.map(frames, iova, grant, perms),
        }
    }

    /// Maps `registers` of the machine at their own address, for writing.
    pub fn map_registers(&self, frames: &mut impl Frames, registers: &Grant) -> Result<(), Error> {
        let memory = Memory::Device;
        let attributes = Attributes { memory, ..Perms::READ_WRITE.into() };
        let at = registers.phys().start.0;
        match self {
            Self::First(tree) => tree.map(frames, at, registers, attributes),
            Self::Second(tree) => tree.map(frames, at, registers, attributes),
        }
    }

    /// Unmaps `bytes` from `iova`.
    #[inline(always)]
    pub fn unmap(&self, frames: &mut impl Frames, iova: u64, bytes: u64) -> Result<Unmapped, Error> {
        Ok(match self {
            Self::First(tree) => Unmapped::First(out_of(tree, frames, iova, bytes)?),
            Self::Second(tree) => Unmapped::Second(out_of(tree, frames, iova, bytes)?),
        })
    }

    /// Gives all frames back. Nobody walks the tables any more.
    pub fn take_down(self, frames: &mut impl Frames) {
        match self {
            Self::First(tree) => tree.take_down(frames),
            Self::Second(tree) => tree.take_down(frames),
        }
    }
}

/// Takes `bytes` from `iova` out of a tree. Its caller invalidates them, so only the tables that went are kept.
#[inline(always)]
fn out_of<F: Format>(
    tree: &Tree<F>,
    frames: &mut impl Frames,
    iova: u64,
    bytes: u64,
) -> Result<Retired<F>, Error> {
    if bytes == PAGE_SIZE && tree.unmap_page(frames, iova).is_some() {
        return Ok(Retired::NONE);
    }
    let mut gather = Gather::new();
    tree.unmap(frames, iova, bytes, &mut gather)?;
    Ok(gather.into_retired())
}

/// The tables that an unmap took out of use, and the unit may still walk. What it unmapped its caller knows.
#[must_use = "the frames of tables that went come back when the unit has forgotten them"]
pub enum Unmapped {
    /// Out of the first stage.
    First(Retired<unit::FirstStage>),
    /// Out of the second.
    Second(Retired<unit::SecondStage>),
}

impl Unmapped {
    /// Returns whether tables went with the mappings.
    pub fn tables_went(&self) -> bool {
        match self {
            Self::First(retired) => !retired.is_empty(),
            Self::Second(retired) => !retired.is_empty(),
        }
    }

    /// Gives the frames of the tables that went back: the unit has forgotten them.
    pub fn give_back(self, frames: &mut impl Frames) {
        match self {
            Self::First(retired) => retired.give_back(frames),
            Self::Second(retired) => retired.give_back(frames),
        }
    }
}
