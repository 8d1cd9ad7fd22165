//! How large an image is, and whose code and statics are in it.
//!
//! Code counts for whose source it was compiled from, by the image's own line tables: what was inlined into a caller is
//! still its author's. Statics count for the crate that their symbol names.

use std::{borrow::Cow, collections::BTreeMap, fs, path::Path};

use gimli::{EndianSlice, LittleEndian};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

use crate::error::Error;

/// The crates that are told apart, by the directory of their sources and the name in their symbols.
const CRATES: [(&str, &str); 9] = [
    ("/drivers/iommu/src/", "iommu"),
    ("/drivers/vtd/src/", "vtd"),
    ("/drivers/smmuv3/src/", "smmuv3"),
    ("/drivers/pcie/src/", "pcie"),
    ("/drivers/pgtable/src/", "pgtable"),
    ("/drivers/broker/src/", "broker"),
    ("/drivers/channel/src/", "channel"),
    ("/arch/", "arch"),
    ("/hv/src/", "hv"),
];
/// Everything else: the language's own library, and crates of others.
const OTHERS: &str = "crates of others";

/// Bytes of one crate in an image.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Size {
    pub(crate) code: u64,
    /// Writable, whether it is zero at first or not.
    pub(crate) statics: u64,
}

/// Bytes of an image, by crate.
pub(crate) type Sizes = BTreeMap<&'static str, Size>;

/// Measures the ELF image at `path`.
pub(crate) fn of_image(path: &Path) -> Result<Sizes, Error> {
    let bytes = fs::read(path).map_err(Error::io("reading", path))?;
    measure(&bytes).map_err(|said| Error::Image(format!("{}: {said}", path.display())))
}

fn measure(elf: &[u8]) -> Result<Sizes, String> {
    let file = object::File::parse(elf).map_err(|error| error.to_string())?;
    let mut sizes = Sizes::new();
    count_code(&file, &mut sizes).map_err(|error| format!("its line tables cannot be read: {error}"))?;
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Data) {
        let section = symbol.section_index().and_then(|index| file.section_by_index(index).ok());
        let writable =
            section.is_some_and(|s| matches!(s.kind(), SectionKind::Data | SectionKind::UninitializedData));
        if let (true, Ok(name)) = (writable, symbol.name()) {
            sizes.entry(crate_of_symbol(name)).or_default().statics += symbol.size();
        }
    }
    Ok(sizes)
}

/// Adds the code of `file`, each byte to one crate.
fn count_code(file: &object::File<'_>, sizes: &mut Sizes) -> Result<(), gimli::Error> {
    let code: Vec<_> = file
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
        .map(|section| section.address()..section.address() + section.size())
        .collect();
    let load = |id: gimli::SectionId| -> Result<Cow<'_, [u8]>, gimli::Error> {
        let data = file.section_by_name(id.name()).and_then(|section| section.uncompressed_data().ok());
        Ok(data.unwrap_or_default())
    };
    let sections = gimli::DwarfSections::load(load)?;
    let dwarf = sections.borrow(|bytes| EndianSlice::new(bytes, LittleEndian));
    let mut told = 0;
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        let unit = dwarf.unit(header)?;
        let Some(program) = unit.line_program.clone() else { continue };
        let mut rows = program.rows();
        // Whose the row before is, and where it begins.
        let mut before: Option<(&'static str, u64)> = None;
        while let Some((header, row)) = rows.next_row()? {
            if let Some((whose, start)) = before.take()
                && code.iter().any(|code| code.contains(&start))
            {
                let bytes = row.address().saturating_sub(start);
                sizes.entry(whose).or_default().code += bytes;
                told += bytes;
            }
            if !row.end_sequence() {
                let whose = match row.file(header) {
                    Some(file) => {
                        let part = |value| dwarf.attr_string(&unit, value).map(|s| s.to_string_lossy());
                        let directory = file.directory(header).map(part).transpose()?.unwrap_or_default();
                        let of_unit = unit.comp_dir.map(|dir| dir.to_string_lossy()).unwrap_or_default();
                        let name = part(file.path_name())?;
                        crate_of_source(&format!("{of_unit}/{directory}/{name}"))
                    }
                    None => OTHERS,
                };
                before = Some((whose, row.address()));
            }
        }
    }
    // Assembly has no lines; padding has none either.
    let all: u64 = code.iter().map(|code| code.end - code.start).sum();
    sizes.entry(OTHERS).or_default().code += all.saturating_sub(told);
    Ok(())
}

/// Returns whose the source file at `path` is: the last directory that is somebody's says.
fn crate_of_source(path: &str) -> &'static str {
    // What was fetched may lie below a directory of ours.
    if ["/registry/", "/rustc/", "/library/"].iter().any(|others| path.contains(others)) {
        return OTHERS;
    }
    let places = CRATES.iter().filter_map(|(directory, name)| Some((path.rfind(directory)?, *name)));
    places.max().map_or(OTHERS, |(_, name)| name)
}

/// Returns the crate that a symbol names: `_ZN`, then each part of its path with its length in front.
fn crate_of_symbol(symbol: &str) -> &'static str {
    let first = symbol.strip_prefix("_ZN").and_then(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let length: usize = rest[..digits].parse().ok()?;
        rest.get(digits..digits + length)
    });
    let is_it = |(_, name): &&(&str, &'static str)| Some(*name) == first;
    CRATES.iter().find(is_it).map_or(OTHERS, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_the_crate_s_that_it_lies_in() {
        for (path, whose) in [
            ("/w/drivers/vtd/src/queue.rs", "vtd"),
            ("/w//w/arch/x86_64/src/bus.rs", "arch"),
            ("/w/hv/src/main.rs", "hv"),
            ("/rustc/0123/library/core/src/iter/range.rs", OTHERS),
            ("/hv/src/registry/../w/.cargo/registry/src/spin/mutex.rs", OTHERS),
            ("/w/tests/guest/src/main.rs", OTHERS),
        ] {
            assert_eq!(crate_of_source(path), whose, "{path}");
        }
    }

    #[test]
    fn a_static_is_the_crate_s_that_its_symbol_names() {
        for (symbol, whose) in [
            ("_ZN2hv10hypervisor6LEDGER17h0123E", "hv"),
            ("_ZN4arch5entry6STACKS17h0123E", "arch"),
            ("_ZN4core3fmt5WRITE17h0123E", OTHERS),
            ("_ZN99hv", OTHERS),
            ("_ZN", OTHERS),
            ("boot_pml4", OTHERS),
        ] {
            assert_eq!(crate_of_symbol(symbol), whose, "{symbol}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(measure(b"not an image").is_err());
    }

    #[test]
    fn every_byte_of_code_is_somebody_s() {
        // This very test has line tables as an image has them.
        let path = std::env::current_exe().unwrap();
        let bytes = fs::read(&path).unwrap();
        let file = object::File::parse(&bytes[..]).unwrap();
        let text = file.sections().filter(|s| s.kind() == SectionKind::Text).map(|s| s.size()).sum::<u64>();

        let code: u64 = of_image(&path).unwrap().values().map(|size| size.code).sum();

        assert_eq!(code, text);
    }
}
