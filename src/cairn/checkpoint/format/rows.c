/* Columns of a matrix out of a mapped file: short runs, each to the end of the one before.

   Stores go past the caches. An ordinary store first reads the line that it overwrites, which costs a copy of short runs half
   its time again; the kernel's own copies, which plain reading is, do without. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LINE 64
#define STREAM(to, from) _mm512_stream_si512((void *)(to), _mm512_loadu_si512(from))
#elif defined(__AVX__)
#include <immintrin.h>
#define LINE 32
#define STREAM(to, from) _mm256_stream_si256((void *)(to), _mm256_loadu_si256((const void *)(from)))
#elif defined(__SSE2__)
#include <emmintrin.h>
#define LINE 16
#define STREAM(to, from) _mm_stream_si128((void *)(to), _mm_loadu_si128((const void *)(from)))
#endif

/* to (rows, width bytes) from runs of `width` bytes that lie `distance` bytes apart */
void cairn_copy_rows(const char *from, int64_t distance, char *to, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++, from += distance, to += width) {
        int64_t done = 0;
#ifdef STREAM
        int64_t head = -(intptr_t)to & (LINE - 1);
        if (head + LINE <= width) {
            memcpy(to, from, head);
            for (done = head; done + LINE <= width; done += LINE) STREAM(to + done, from + done);
        }
#endif
        memcpy(to + done, from + done, width - done);
    }
#ifdef STREAM
    _mm_sfence();
#endif
}
