//! The memory image of an ELF file, as the arm64 Linux boot protocol wants it: QEMU hands a ramdisk over to such an image
//! alone, and not to an ELF file.

/// The most bytes that an image may have; a hypervisor has a few hundred KiB.
const LIMIT: u64 = 64 << 20;

/// Type of a program header whose content is loaded (`PT_LOAD`).
const LOAD: u32 = 1;

/// Returns the bytes that the 64-bit, little-endian ELF file `elf` puts into memory, from its lowest physical address on;
/// `None` if it is none, or contradicts itself.
///
/// What is zero at the end (`.bss`) is left out: the image says in its own header how much memory it takes.
pub(crate) fn image(elf: &[u8]) -> Option<Vec<u8>> {
    let headers = usize::try_from(u64_at(elf, 32)?).ok()?;
    let (size, count) = (usize::from(u16_at(elf, 54)?), usize::from(u16_at(elf, 56)?));
    let mut segments = Vec::new();
    for at in (0..count).map(|n| headers.checked_add(n * size)) {
        let header = elf.get(at?..)?;
        let bytes = u64_at(header, 32)?;
        if u32_at(header, 0)? == LOAD && bytes != 0 {
            let from = usize::try_from(u64_at(header, 8)?).ok()?;
            let content = elf.get(from..from.checked_add(usize::try_from(bytes).ok()?)?)?;
            segments.push((u64_at(header, 24)?, content));
        }
    }
    let start = segments.iter().map(|(at, _)| *at).min()?;
    let mut image = Vec::new();
    for (at, content) in segments {
        let end = (at - start).checked_add(content.len() as u64).filter(|&end| end <= LIMIT)? as usize;
        image.resize(image.len().max(end), 0);
        image[end - content.len()..end].copy_from_slice(content);
    }
    Some(image)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with two segments: four bytes for 0x4020_0004, and four for 0x4020_0000 with as many zeros behind.
    fn elf() -> Vec<u8> {
        let mut elf = vec![0; 64 + 2 * 56 + 8];
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        for (n, (phys, from)) in [(0x4020_0004u64, 176u64), (0x4020_0000, 180)].into_iter().enumerate() {
            let header = &mut elf[64 + n * 56..];
            header[0] = 1;
            header[8..16].copy_from_slice(&from.to_le_bytes());
            header[24..32].copy_from_slice(&phys.to_le_bytes());
            header[32] = 4;
            header[40] = 8;
        }
        elf[176..].copy_from_slice(b"tailhead");
        elf
    }

    #[test]
    fn segments_lie_where_their_addresses_say() {
        assert_eq!(image(&elf()).as_deref(), Some(&b"headtail"[..]));
    }

    #[test]
    fn a_file_that_contradicts_itself_has_no_image() {
        let whole = elf();
        for end in 0..whole.len() {
            assert_eq!(image(&whole[..end]), None, "cut at {end}");
        }
        let mut far = whole.clone();
        far[64 + 24 + 7] = 0x80;
        assert_eq!(image(&far), None, "segments 2^63 bytes apart");
    }
}
