/* A guest in C: reads the frames of a channel from standard input, and prints what it finds. Sizes and offsets are those of
 * the documentation, written down here once more. */
#include <inttypes.h>
#include <stdio.h>

#include "portcullis.h"

#define AT(field, offset, size)                                                                                       \
    _Static_assert(offsetof(struct portcullis_record, field) == (offset), #field);                                    \
    _Static_assert(sizeof(((struct portcullis_record *)0)->field) == (size), #field)

_Static_assert(sizeof(struct portcullis_record) == 64, "eight words");
AT(number, 0, 8);
AT(address, 8, 8);
AT(opaque, 16, 8);
AT(device, 24, 4);
AT(pasid, 28, 4);
AT(kind, 32, 1);
AT(access, 33, 1);
AT(privileged, 34, 1);
AT(group, 36, 2);
AT(reason, 38, 2);
AT(pages, 40, 4);
AT(index, 44, 4);
AT(lost, 48, 8);
_Static_assert(sizeof(struct portcullis_answer) == 16, "cookie and code");
_Static_assert(sizeof(struct portcullis_pages) == 32, "four words");
_Static_assert(sizeof(struct portcullis_smmu_command) == 16, "128 bits");
_Static_assert(PORTCULLIS_FRAMES * PORTCULLIS_FRAME_BYTES == 16384, "four frames of 4 KiB");
_Static_assert(PORTCULLIS_RECORDS * sizeof(struct portcullis_record) == PORTCULLIS_FRAME_BYTES, "a ring is a frame");
_Static_assert(PORTCULLIS_REQUESTS_LOST_WORD == 4 && PORTCULLIS_EVENTS_LOST_WORD == 5, "header");
_Static_assert(PORTCULLIS_CALL_RESPOND == 6 && PORTCULLIS_CALL_INVALIDATE == 7 && PORTCULLIS_CALL_COUNTERS == 8, "calls");
_Static_assert(PORTCULLIS_CODE_SUCCESS == 0 && PORTCULLIS_CODE_INVALID == 1 && PORTCULLIS_CODE_FAILURE == 15, "codes");
_Static_assert(PORTCULLIS_COUNTERS_WORDS == 64 && PORTCULLIS_COUNTER_LOST_EVENTS == 15, "counters");
_Static_assert(PORTCULLIS_NONE == UINT64_MAX && PORTCULLIS_WRITABLE == UINT64_C(1) << 63, "arguments");

static _Alignas(4096) unsigned char frames[PORTCULLIS_FRAMES * PORTCULLIS_FRAME_BYTES];

static void print(const char *what, const struct portcullis_record *r)
{
    printf("%s %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx32 " %" PRIx32 " %u %u %u %x %u %" PRIu32 " %" PRIu32
           " %" PRIu64 "\n",
           what, r->number, r->address, r->opaque, r->device, r->pasid, r->kind, r->access, r->privileged, r->group,
           r->reason, r->pages, r->index, r->lost);
}

int main(void)
{
    struct portcullis_channel channel;
    struct portcullis_record record;
    const union {
        struct portcullis_pages pages;
        uint64_t words[4];
    } entry = {.pages = {.attachment = 7, .address = 0x5000, .pages = 3, .flags = PORTCULLIS_LEAF}};

    if (fread(frames, 1, sizeof frames, stdin) != sizeof frames)
        return 1;
    if (!portcullis_open(&channel, frames)) {
        puts("no channel");
        return 0;
    }
    while (portcullis_next_request(&channel, &record))
        print("request", &record);
    while (portcullis_next_event(&channel, &record))
        print("event", &record);
    printf("consumed %" PRIu64 " %" PRIu64 "\n",
           portcullis_load(&channel, PORTCULLIS_CONSUMER_FRAME, PORTCULLIS_REQUESTS_WORD),
           portcullis_load(&channel, PORTCULLIS_CONSUMER_FRAME, PORTCULLIS_EVENTS_WORD));
    printf("lost %" PRIu64 " %" PRIu64 "\n",
           portcullis_load(&channel, PORTCULLIS_HEADER_FRAME, PORTCULLIS_REQUESTS_LOST_WORD),
           portcullis_load(&channel, PORTCULLIS_HEADER_FRAME, PORTCULLIS_EVENTS_LOST_WORD));
    printf("entry %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 "\n", entry.words[0], entry.words[1], entry.words[2],
           entry.words[3]);
    return 0;
}
