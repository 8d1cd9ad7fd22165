//! The C header: the wire layout for guests that are not written in Rust, from the same constants.
//!
//! `cargo run -p channel --example header > drivers/channel/include/portcullis.h` makes it anew.

use crate::{
    Call, Code, Record, Status, call, counters,
    counters::Counter,
    invalidate,
    invalidate::{Layout, Refused},
    record,
    record::{Kind, NO_PASID, RECORD_WORDS, Wanted},
    ring,
};
use core::fmt::{Result, Write};
use iommu::Words as _;

/// Writes the header to `out`.
pub fn write(out: &mut impl Write) -> Result {
    out.write_str(OPENING)?;
    numbers(out)?;
    enumeration(out, "call", Call::ALL)?;
    enumeration(out, "status", Status::ALL)?;
    enumeration(out, "code", Code::ALL)?;
    enumeration(out, "kind", Kind::ALL)?;
    enumeration(out, "access", Wanted::ALL)?;
    enumeration(out, "reason", record::Reason::ALL)?;
    enumeration(out, "invalidate", Layout::ALL)?;
    enumeration(out, "refused", Refused::ALL)?;
    enumeration(out, "counter", Counter::ALL)?;
    structure(out)?;
    out.write_str(CLOSING)
}

const OPENING: &str = "\
/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* What a guest sees of Portcullis: the fault channel and the calls. Made from drivers/channel, where all of it is
 * explained; do not edit. Names in comments stand without their prefix. For little-endian machines, as the wire
 * is. */
#ifndef PORTCULLIS_H
#define PORTCULLIS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

";

/// Writes the constants.
fn numbers(out: &mut impl Write) -> Result {
    for (name, value) in [
        ("FRAMES", ring::FRAMES as u64),
        ("FRAME_BYTES", ring::FRAME_BYTES as u64),
        ("RECORDS", ring::RECORDS),
        ("RECORD_WORDS", RECORD_WORDS as u64),
        ("HEADER_FRAME", ring::HEADER as u64),
        ("REQUESTS_FRAME", ring::REQUESTS as u64),
        ("EVENTS_FRAME", ring::EVENTS as u64),
        ("CONSUMER_FRAME", ring::CONSUMER as u64),
        ("MAGIC", ring::MAGIC),
        ("CHANNEL_VERSION", ring::VERSION),
        ("MAGIC_WORD", ring::MAGIC_WORD as u64),
        ("VERSION_WORD", ring::VERSION_WORD as u64),
        ("REQUESTS_WORD", ring::REQUESTS_WORD as u64),
        ("EVENTS_WORD", ring::EVENTS_WORD as u64),
        ("REQUESTS_LOST_WORD", ring::REQUESTS_LOST_WORD as u64),
        ("EVENTS_LOST_WORD", ring::EVENTS_LOST_WORD as u64),
        ("NO_PASID", NO_PASID),
        ("CALLS_VERSION", call::VERSION),
        ("ARRAY", call::ARRAY),
        ("NONE", call::NONE),
        ("DEADLINE_US", call::DEADLINE_US),
        ("DEADLINE_MAX_US", call::DEADLINE_MAX_US),
        ("WRITABLE", call::WRITABLE),
        ("REQUESTS", call::REQUESTS),
        ("LEAF", invalidate::LEAF),
        ("ALL_PAGES", invalidate::ALL_PAGES),
        ("COUNTERS_WORDS", counters::COUNTERS_WORDS as u64),
        ("BUCKETS", counters::BUCKETS as u64),
        ("TO_CHANNEL_WORD", counters::TO_CHANNEL_WORD as u64),
        ("TO_ANSWER_WORD", counters::TO_ANSWER_WORD as u64),
    ] {
        // Large numbers are patterns.
        if value < 1 << 24 {
            writeln!(out, "#define PORTCULLIS_{name} UINT64_C({value})")?;
        } else {
            writeln!(out, "#define PORTCULLIS_{name} UINT64_C({value:#x})")?;
        }
    }
    Ok(())
}

/// Writes an enumeration with what is said about each of its numbers.
fn enumeration(out: &mut impl Write, name: &str, all: &[(&str, u64, &[&str])]) -> Result {
    writeln!(out, "\nenum portcullis_{name} {{")?;
    for (variant, number, docs) in all {
        for (at, line) in docs.iter().enumerate() {
            out.write_str(if at == 0 { "    /*" } else { "\n     *" })?;
            plain(out, line)?;
        }
        out.write_str(" */\n    PORTCULLIS_")?;
        upper(out, name)?;
        out.write_char('_')?;
        upper(out, variant)?;
        writeln!(out, " = {number},")?;
    }
    out.write_str("};\n")
}

/// Writes a name as C has its constants: `ReadWrite` as `READ_WRITE`.
fn upper(out: &mut impl Write, name: &str) -> Result {
    for (at, letter) in name.char_indices() {
        if at > 0 && letter.is_ascii_uppercase() {
            out.write_char('_')?;
        }
        out.write_char(letter.to_ascii_uppercase())?;
    }
    Ok(())
}

/// Writes a line of documentation without the marks of links and code.
fn plain(out: &mut impl Write, line: &str) -> Result {
    let mut rest = line;
    while let Some((text, link)) = rest.split_once("](") {
        write_unmarked(out, text)?;
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    write_unmarked(out, rest)
}

fn write_unmarked(out: &mut impl Write, text: &str) -> Result {
    text.chars()
        .filter(|letter| !matches!(letter, '[' | ']' | '`'))
        .try_for_each(|letter| out.write_char(letter))
}

/// Writes a record as a structure. Each field lies in an integer of its own: the smallest aligned one that holds it.
fn structure(out: &mut impl Write) -> Result {
    out.write_str("\n/* One record of a ring. */\nstruct portcullis_record {\n")?;
    let mut written = 0;
    for (name, field, meaning) in Record::FIELDS {
        let (lowest, highest) = (field.lowest(), field.lowest() + field.width() - 1);
        let bits = [8, 16, 32, 64].into_iter().find(|bits| lowest / bits == highest / bits).unwrap_or(64);
        let start = lowest / bits * bits;
        padding(out, written, start)?;
        writeln!(out, "    uint{bits}_t {name}; /* {meaning} */")?;
        written = start + bits;
    }
    let bits = Record::default().words().len() as u32 * 64;
    padding(out, written, bits)?;
    writeln!(out, "}};\n_Static_assert(sizeof(struct portcullis_record) == {}, \"a record\");", bits / 8)
}

/// Writes the zeroes between two fields.
fn padding(out: &mut impl Write, from: u32, to: u32) -> Result {
    match to.saturating_sub(from) / 8 {
        0 => Ok(()),
        bytes => writeln!(out, "    uint8_t zero_{}[{bytes}];", from / 8),
    }
}

const CLOSING: &str = "
/* One entry of the array of CALL_RESPOND. */
struct portcullis_answer {
    uint64_t cookie;
    uint64_t code;
};

/* One entry of an array of INVALIDATE_PAGES or INVALIDATE_VTD_STAGE1. */
struct portcullis_pages {
    uint64_t attachment;
    uint64_t address;
    uint64_t pages;
    uint64_t flags;
};

/* One entry of an array of INVALIDATE_SMMU_COMMAND, as the architecture lays it out. */
struct portcullis_smmu_command {
    uint64_t words[2];
};

/* A guest's end of a channel: the only consumer. */
struct portcullis_channel {
    _Atomic uint64_t *frames;
    uint64_t requests;
    uint64_t events;
};

static inline _Atomic uint64_t *portcullis_word(const struct portcullis_channel *channel, size_t frame, size_t word)
{
    return channel->frames + frame * (PORTCULLIS_FRAME_BYTES / 8) + word;
}

static inline uint64_t portcullis_load(const struct portcullis_channel *channel, size_t frame, size_t word)
{
    return atomic_load_explicit(portcullis_word(channel, frame, word), memory_order_acquire);
}

/* Opens the channel in the frames, one after the other in memory; false if it is not one of this version. */
static inline bool portcullis_open(struct portcullis_channel *channel, void *frames)
{
    channel->frames = frames;
    if (portcullis_load(channel, PORTCULLIS_HEADER_FRAME, PORTCULLIS_MAGIC_WORD) != PORTCULLIS_MAGIC)
        return false;
    if (portcullis_load(channel, PORTCULLIS_HEADER_FRAME, PORTCULLIS_VERSION_WORD)
        != (PORTCULLIS_CHANNEL_VERSION | PORTCULLIS_RECORDS << 32))
        return false;
    channel->requests = portcullis_load(channel, PORTCULLIS_CONSUMER_FRAME, PORTCULLIS_REQUESTS_WORD);
    channel->events = portcullis_load(channel, PORTCULLIS_CONSUMER_FRAME, PORTCULLIS_EVENTS_WORD);
    return true;
}

/* Takes record *at of a ring, and gives its place back; false if there is none yet. */
static inline bool portcullis_next(const struct portcullis_channel *channel, size_t ring, size_t word, uint64_t *at,
                                   struct portcullis_record *record)
{
    union {
        uint64_t words[PORTCULLIS_RECORD_WORDS];
        struct portcullis_record record;
    } copy;
    /* Acquire: the record is read after the index that admits it. */
    if (portcullis_load(channel, PORTCULLIS_HEADER_FRAME, word) == *at)
        return false;
    for (size_t i = 0; i < PORTCULLIS_RECORD_WORDS; i++) {
        size_t place = (size_t)(*at % PORTCULLIS_RECORDS * PORTCULLIS_RECORD_WORDS) + i;
        copy.words[i] = atomic_load_explicit(portcullis_word(channel, ring, place), memory_order_relaxed);
    }
    *record = copy.record;
    *at += 1;
    /* Release: the record was read before its place is given back. */
    atomic_store_explicit(portcullis_word(channel, PORTCULLIS_CONSUMER_FRAME, word), *at, memory_order_release);
    return true;
}

/* Takes the next page of a request; false if there is none yet. */
static inline bool portcullis_next_request(struct portcullis_channel *channel, struct portcullis_record *record)
{
    return portcullis_next(channel, PORTCULLIS_REQUESTS_FRAME, PORTCULLIS_REQUESTS_WORD, &channel->requests, record);
}

/* Takes the next event; false if there is none yet. */
static inline bool portcullis_next_event(struct portcullis_channel *channel, struct portcullis_record *record)
{
    return portcullis_next(channel, PORTCULLIS_EVENTS_FRAME, PORTCULLIS_EVENTS_WORD, &channel->events, record);
}

#endif
";
