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

#define PORTCULLIS_FRAMES UINT64_C(4)
#define PORTCULLIS_FRAME_BYTES UINT64_C(4096)
#define PORTCULLIS_RECORDS UINT64_C(64)
#define PORTCULLIS_RECORD_WORDS UINT64_C(8)
#define PORTCULLIS_HEADER_FRAME UINT64_C(0)
#define PORTCULLIS_REQUESTS_FRAME UINT64_C(1)
#define PORTCULLIS_EVENTS_FRAME UINT64_C(2)
#define PORTCULLIS_CONSUMER_FRAME UINT64_C(3)
#define PORTCULLIS_MAGIC UINT64_C(0x4e41484354524f50)
#define PORTCULLIS_CHANNEL_VERSION UINT64_C(1)
#define PORTCULLIS_MAGIC_WORD UINT64_C(0)
#define PORTCULLIS_VERSION_WORD UINT64_C(1)
#define PORTCULLIS_REQUESTS_WORD UINT64_C(2)
#define PORTCULLIS_EVENTS_WORD UINT64_C(3)
#define PORTCULLIS_REQUESTS_LOST_WORD UINT64_C(4)
#define PORTCULLIS_EVENTS_LOST_WORD UINT64_C(5)
#define PORTCULLIS_NO_PASID UINT64_C(0xffffffff)
#define PORTCULLIS_CALLS_VERSION UINT64_C(1)
#define PORTCULLIS_ARRAY UINT64_C(16)
#define PORTCULLIS_NONE UINT64_C(0xffffffffffffffff)
#define PORTCULLIS_DEADLINE_US UINT64_C(100000)
#define PORTCULLIS_DEADLINE_MAX_US UINT64_C(10000000)
#define PORTCULLIS_WRITABLE UINT64_C(0x8000000000000000)
#define PORTCULLIS_REQUESTS UINT64_C(0x100000000)
#define PORTCULLIS_LEAF UINT64_C(1)
#define PORTCULLIS_ALL_PAGES UINT64_C(0xffffffffffffffff)
#define PORTCULLIS_COUNTERS_WORDS UINT64_C(68)
#define PORTCULLIS_BUCKETS UINT64_C(24)
#define PORTCULLIS_TO_CHANNEL_WORD UINT64_C(20)
#define PORTCULLIS_TO_ANSWER_WORD UINT64_C(44)

enum portcullis_call {
    /* What there is. Argument: 0, or the number of a device from 1. Returns for 0: version, devices, the
     * first PASID that may be attached, or NONE; for a device: address and size of its registers in the guest's memory,
     * vendor and device identity (15:0, 31:16) with REQUESTS or not. */
    PORTCULLIS_CALL_PROBE = 0,
    /* Opens the fault channel. Returns its address in the guest's memory; once only. */
    PORTCULLIS_CALL_OPEN_CHANNEL = 1,
    /* Attaches a device. Arguments: device, PASID or NONE, opaque value, deadline in microseconds or NONE.
     * Returns a name for the attachment. */
    PORTCULLIS_CALL_ATTACH = 2,
    /* Detaches. Argument: attachment. Everything outstanding is answered when it returns. */
    PORTCULLIS_CALL_DETACH = 3,
    /* Maps memory of the guest for an attachment. Arguments: attachment with WRITABLE or not, device address,
     * guest address, bytes. */
    PORTCULLIS_CALL_MAP = 4,
    /* Unmaps. Arguments: attachment, device address, bytes. Nothing reaches the memory any more when it is done;
     * after Status::TimedOut the device may, until it is detached. */
    PORTCULLIS_CALL_UNMAP = 5,
    /* Answers page requests. Arguments: guest address of an array of {cookie, Code}, its length. Returns how many
     * were handled, and how many of those were refused. */
    PORTCULLIS_CALL_RESPOND = 6,
    /* Forgets translations. Arguments: type of the array (Layout), its guest
     * address, its entries. Returns how many were handled, from the first; why the one after those was refused,
     * or 0 (Refused in 31:0, the word of the entry in 63:32); the bits that were
     * wrong. Fewer than all without a refusal: ask again for the rest. An empty array asks whether the type is
     * known: the status is Status::Done or Status::UnknownType. */
    PORTCULLIS_CALL_INVALIDATE = 7,
    /* Reads the counters of a device. Arguments: device, guest address, bytes. Writes whole words, as many as
     * there are and fit (counters). Returns the bytes written. */
    PORTCULLIS_CALL_COUNTERS = 8,
    /* Attaches a device by a first stage of the guest's own, whose addresses are the guest's. Arguments: device, guest
     * address of its SMMUv3 stream table entry, as the guest would write it for an SMMU without a second stage, opaque
     * value. Returns a name for the attachment, for which nothing is mapped by call. What the guest changes in its
     * tables it has forgotten by Call::Invalidate, as commands of SMMUv3. */
    PORTCULLIS_CALL_BIND = 9,
    /* Demonstration: what this guest is to do. Returns a task and two values. */
    PORTCULLIS_CALL_TASK = 256,
    /* Demonstration: a line for the log. Arguments: guest address, bytes (at most 128). */
    PORTCULLIS_CALL_SAY = 257,
    /* Demonstration: a number for the report. Arguments: which, from 0; value. */
    PORTCULLIS_CALL_REPORT = 258,
    /* Demonstration: the task is done. Argument: 1 if all went as expected. */
    PORTCULLIS_CALL_FINISH = 259,
    /* Demonstration: waits for an interrupt, or for so many microseconds. Argument: microseconds.
     *
     * An interrupt that is pending, even while the guest masks its interrupts, ends the wait at once. A guest that looks
     * whether something came and then calls this masks its interrupts before the look, and unmasks them after the call:
     * else there is a window between the two, in which an interrupt comes, is taken, and leaves nothing that ends the wait. */
    PORTCULLIS_CALL_SLEEP = 260,
};

enum portcullis_status {
    /* It was done. */
    PORTCULLIS_STATUS_DONE = 0,
    /* There is no such operation. */
    PORTCULLIS_STATUS_UNKNOWN_CALL = 1,
    /* An argument names nothing of this guest's: a device, an attachment, memory. */
    PORTCULLIS_STATUS_NOT_YOURS = 2,
    /* An argument is malformed: not whole pages, a PASID of more bits, too long. */
    PORTCULLIS_STATUS_MALFORMED = 3,
    /* It is so already, or not in a state for this. */
    PORTCULLIS_STATUS_WRONG_STATE = 4,
    /* There is no room for more. */
    PORTCULLIS_STATUS_NO_ROOM = 5,
    /* Hardware did not complete it in time. What it concerns stays blocked and out of use. */
    PORTCULLIS_STATUS_TIMED_OUT = 6,
    /* The unit takes no arrays of this type. */
    PORTCULLIS_STATUS_UNKNOWN_TYPE = 7,
};

enum portcullis_code {
    /* The pages are there. */
    PORTCULLIS_CODE_SUCCESS = 0,
    /* They will not be. */
    PORTCULLIS_CODE_INVALID = 1,
    /* The device is to send no more page requests (Response Failure).
     *
     * This is what a guest would tell its device. Hardware is told that the pages will not be there, since
     * devices share what a failure stops; from then on the hypervisor refuses the device's requests, until it
     * has a new owner. */
    PORTCULLIS_CODE_FAILURE = 15,
};

enum portcullis_kind {
    /* A page of a page request, which waits for an answer. */
    PORTCULLIS_KIND_REQUEST = 1,
    /* An unrecoverable fault. */
    PORTCULLIS_KIND_EVENT = 2,
};

enum portcullis_access {
    /* Neither of the others. */
    PORTCULLIS_ACCESS_NOTHING = 0,
    /* To read. */
    PORTCULLIS_ACCESS_READ = 1,
    /* To write. */
    PORTCULLIS_ACCESS_WRITE = 2,
    /* To read and write. */
    PORTCULLIS_ACCESS_READ_WRITE = 3,
    /* To fetch instructions, and to read. */
    PORTCULLIS_ACCESS_FETCH = 4,
};

enum portcullis_reason {
    /* Something else. */
    PORTCULLIS_REASON_OTHER = 0,
    /* The device, or this PASID of it, is attached to nothing. */
    PORTCULLIS_REASON_NOT_ATTACHED = 1,
    /* No mapping at this address. */
    PORTCULLIS_REASON_NOT_MAPPED = 2,
    /* A mapping that does not permit this access. */
    PORTCULLIS_REASON_NOT_PERMITTED = 3,
    /* An address outside what can be mapped. */
    PORTCULLIS_REASON_ADDRESS_SIZE = 4,
    /* Of the device as a whole, and told once: it has more of these than it may. If it goes on, it is blocked. */
    PORTCULLIS_REASON_TOO_MANY = 5,
    /* Of the device as a whole, and told once: it had too many of these, so that it is blocked and no more are told. It may be
     * used again once it was given back and reset. */
    PORTCULLIS_REASON_BLOCKED = 6,
};

enum portcullis_invalidate {
    /* Pages of an address space that the hypervisor holds. */
    PORTCULLIS_INVALIDATE_PAGES = 1,
    /* Pages of a VT-d first stage that the guest bound. */
    PORTCULLIS_INVALIDATE_VTD_STAGE1 = 2,
    /* Commands of SMMUv3. */
    PORTCULLIS_INVALIDATE_SMMU_COMMAND = 3,
};

enum portcullis_refused {
    /* No command of this opcode is taken. */
    PORTCULLIS_REFUSED_OPCODE = 1,
    /* Bits are set that have no meaning here. */
    PORTCULLIS_REFUSED_BITS = 2,
    /* No pages, or pages beyond the last address, or an address with all of them. */
    PORTCULLIS_REFUSED_RANGE = 3,
    /* The sizes of a range exclude one another, or stand for nothing. */
    PORTCULLIS_REFUSED_SIZE = 4,
    /* An attachment or a device that is none of the guest's. */
    PORTCULLIS_REFUSED_NOT_YOURS = 5,
};

enum portcullis_counter {
    /* Page requests that the device sent. */
    PORTCULLIS_COUNTER_REQUESTS = 0,
    /* Groups of which at least one request came. */
    PORTCULLIS_COUNTER_GROUPS = 1,
    /* Groups that the guest answered with success. */
    PORTCULLIS_COUNTER_SUCCEEDED = 2,
    /* Groups that the guest declined. */
    PORTCULLIS_COUNTER_DECLINED = 3,
    /* Groups that nobody answered in time. */
    PORTCULLIS_COUNTER_EXPIRED = 4,
    /* Groups that were answered because their attachment, device or queue went. */
    PORTCULLIS_COUNTER_EVICTED = 5,
    /* Groups that were answered at once: over budget, poisoned, no room, nobody attached. */
    PORTCULLIS_COUNTER_REFUSED = 6,
    /* Groups that were poisoned: parts over budget, or a number that was used twice. */
    PORTCULLIS_COUNTER_POISONED = 7,
    /* Half-seen groups without an answer from the hypervisor: an overflow lost them, they never ended, or they left. */
    PORTCULLIS_COUNTER_DISCARDED = 8,
    /* Requests with the number of a group that was whole already. */
    PORTCULLIS_COUNTER_DUPLICATES = 9,
    /* Times that the unit lost requests of nobody knows which device. */
    PORTCULLIS_COUNTER_OVERFLOWS = 10,
    /* Answers to a group that was answered before, by the guest or for it. */
    PORTCULLIS_COUNTER_LATE = 11,
    /* Answers with the cookie of an earlier group. */
    PORTCULLIS_COUNTER_STALE = 12,
    /* Answers with a cookie that was never given out. */
    PORTCULLIS_COUNTER_UNKNOWN = 13,
    /* Answers with a cookie that names no place for a group. */
    PORTCULLIS_COUNTER_OUT_OF_RANGE = 14,
    /* Events that the guest never saw, at least; each time that the unit lost nobody knows how many is one. */
    PORTCULLIS_COUNTER_LOST_EVENTS = 15,
    /* Groups that the guest answered with response failure. */
    PORTCULLIS_COUNTER_FAILED = 16,
    /* Groups for a page that the guest had just claimed to have repaired. */
    PORTCULLIS_COUNTER_UNREPAIRED = 17,
    /* Answers that were held back, because the guest had claimed repairs that were none. */
    PORTCULLIS_COUNTER_HELD = 18,
    /* Page requests that wait for an answer now. */
    PORTCULLIS_COUNTER_OUTSTANDING = 19,
};

/* One record of a ring. */
struct portcullis_record {
    uint64_t number; /* cookie of a request; number of an event, counted from 1 */
    uint64_t address; /* of the page; the low 12 bits are zero */
    uint64_t opaque; /* of the attachment */
    uint32_t device; /* the guest's own name for it */
    uint32_t pasid; /* NO_PASID if the access had none */
    uint8_t kind; /* enum portcullis_kind */
    uint8_t access; /* enum portcullis_access */
    uint8_t privileged; /* 1 if it was */
    uint8_t zero_35[1];
    uint16_t group; /* index of a request's group */
    uint16_t reason; /* of an event: enum portcullis_reason */
    uint32_t pages; /* of a request's group */
    uint32_t index; /* which of them this is, from 0 */
    uint64_t lost; /* events lost before this one, at least */
    uint8_t zero_56[8];
};
_Static_assert(sizeof(struct portcullis_record) == 64, "a record");

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
