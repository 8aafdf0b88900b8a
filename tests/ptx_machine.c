/* Runs a kernel's threads on the CPU: ptx_to_c.py puts in what one does, compiled.py compiles and calls launch().

Each thread runs by itself until it must meet others, in an order drawn anew each time, and so do blocks: what rests on
an order that nothing promises comes out wrong. A fault ends the launch and says where: an address that is misaligned,
near zero, outside shared memory or (under AddressSanitizer) outside an allocation; a race, which is two threads at one
address, one writing another value, with no barrier between; threads that meet at unlike instructions, or never. The
places of the last reads and writes are kept in tables where a later one may push out an earlier: a race may be missed,
none is invented. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define SHARED 4096 /* the address of shared memory */
#define STACK (512 << 10)
#define MOST_THREADS 1024
#define SLOTS (1 << 20)
#define NOTES (1 << 20)

enum { RUNS, AT_BARRIER, AT_WARP, ENDED };
enum { SHFL_IDX, SHFL_BFLY, SHFL_UP, SHFL_DOWN, SUM, BALLOT, LOAD_MATRICES, MULTIPLY_MATRICES };

typedef void *Place[5]; /* of __builtin_setjmp, which, unlike swapcontext, asks nothing of the system */

typedef struct {
    ucontext_t start;
    Place place;
    int state, started, line, what;
    uint32_t in[10], out[4];
    uint64_t at;
} Lane;

typedef struct {
    uint64_t at, value;
    uint32_t launch, block, phase;
    int thread;
} Seen;

typedef struct {
    uint64_t *parameters;
    uint32_t ctaid[3], nctaid[3];
    int threads, shared_size, running, failed; /* running: a thread, or -1 */
    uint32_t launch, block, phase;             /* phase: barriers passed by the block */
    uint64_t draw;
    uint8_t *shared;
    uint64_t *notes; /* 0, or a count and up to NOTES of (thread, line, address): what global memory was asked for */
    Seen *shared_writes, *shared_reads;
    Lane *lanes;
    Place scheduler;
    char *message;
} Machine;

static Seen *writes, *reads; /* of global memory */
static uint8_t *stacks;
static int (*outside)(void const volatile *); /* AddressSanitizer's, if it is there */

static __attribute__((noinline)) void go(Place place) { __builtin_longjmp(place, 1); }

static __attribute__((noinline)) void leave(Machine *m, int tid) {
    if (!__builtin_setjmp(m->lanes[tid].place)) go(m->scheduler);
}
static __attribute__((noinline)) void enter(Machine *m, int tid) {
    Lane *lane = m->lanes + tid;
    if (__builtin_setjmp(m->scheduler)) return;
    if (lane->started) go(lane->place);
    lane->started = 1;
    setcontext(&lane->start);
}

static void fault(Machine *m, int tid, int line, uint64_t at, const char *what) {
    if (!m->failed)
        snprintf(m->message, 300, "%s: line %d, block %u, thread %d, address 0x%llx", what, line, m->block, tid,
                 (unsigned long long)at);
    m->failed = 1;
    if (m->running >= 0)
        leave(m, m->running);
}

/* ---- numbers ---- */

static inline float as_f32(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
static inline double as_f64(uint64_t x) { double f; memcpy(&f, &x, 8); return f; }
static inline uint32_t bits_f32(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
static inline uint64_t bits_f64(double f) { uint64_t x; memcpy(&x, &f, 8); return x; }

static inline uint16_t to_bf16(float f) {
    uint32_t x = bits_f32(f);
    return isnan(f) ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static inline float from_bf16(uint16_t x) { return as_f32((uint32_t)x << 16); }
static inline uint16_t to_f16(float f) { _Float16 h = f; uint16_t x; memcpy(&x, &h, 2); return x; }
static inline float from_f16(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return h; }

/* What an approximate instruction may give instead of `f`: the float `steps` further or nearer, by the operand. */
static inline float off_by(float f, int steps, uint32_t operand) {
    if (f == 0 || !isnormal(f)) return f;
    uint32_t sign = (operand * 0x9E3779B1u ^ bits_f32(f) * 0x85EBCA6Bu) >> 31;
    return as_f32(bits_f32(f) + (sign ? steps : -steps));
}

static inline double saturated(double x, double least, double beyond) {
    return isnan(x) ? 0 : x < least ? least : x > beyond - 1 ? beyond - 1 : x;
}

static inline uint32_t field_u32(uint32_t x, uint32_t from, uint32_t count) {
    uint64_t rest = (from & 255) > 31 ? 0 : x >> (from & 255);
    return (count & 255) > 31 ? rest : rest & ((1ull << (count & 255)) - 1);
}
static inline uint32_t field_s32(uint32_t x, uint32_t from, uint32_t count) {
    uint64_t wide = (uint64_t)(int64_t)(int32_t)x; /* what lies past the last bit is the sign */
    uint32_t start = from & 255, n = count & 255;
    if (!n) return 0;
    int64_t rest = (int64_t)wide >> (start > 31 ? 31 : start);
    return n > 31 ? rest : (uint32_t)(int32_t)((int64_t)((uint64_t)rest << (64 - n)) >> (64 - n));
}

static inline uint32_t added_halves(uint32_t a, uint32_t b) {
    return (uint16_t)(a + b) | ((a >> 16) + (b >> 16)) << 16;
}

static inline uint32_t permuted(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t both = (uint64_t)high << 32 | low;
    uint32_t x = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t which = selector >> 4 * i & 15;
        uint8_t byte = both >> 8 * (which & 7);
        if (which & 8) byte = byte & 128 ? 255 : 0;
        x |= (uint32_t)byte << 8 * i;
    }
    return x;
}

/* ---- memory ---- */

static inline Seen *slot(Seen *table, uint64_t at) { return table + ((at * 0x9E3779B97F4A7C15ull) >> 44); }

static inline int meets(Machine *m, Seen *seen, uint64_t at, int tid) {
    return seen->launch == m->launch && seen->at == at && seen->thread >= 0 &&
           (seen->block != m->block || (seen->phase == m->phase && seen->thread != tid));
}
static inline void keep(Machine *m, Seen *seen, uint64_t at, uint64_t value, int tid) {
    *seen = (Seen){at, value, m->launch, m->block, m->phase, tid};
}
static inline void is_read(Machine *m, int tid, int line, uint64_t at, Seen *write, Seen *read) {
    if (meets(m, write, at, tid)) fault(m, tid, line, at, "race: reads what another thread wrote");
    keep(m, read, at, 0, tid);
}
static inline void is_written(Machine *m, int tid, int line, uint64_t at, uint64_t value, Seen *write, Seen *read) {
    if (meets(m, write, at, tid) && write->value != value) fault(m, tid, line, at, "race: writes what another thread wrote");
    if (meets(m, read, at, tid)) fault(m, tid, line, at, "race: writes what another thread read");
    keep(m, write, at, value, tid);
}

static inline uint8_t *global_at(Machine *m, int tid, int line, uint64_t at, int size) {
    if (m->notes && *m->notes < NOTES) {
        uint64_t *note = m->notes + 1 + 3 * (*m->notes)++;
        note[0] = (uint64_t)m->block * MOST_THREADS + tid, note[1] = line, note[2] = at;
    }
    if (at < 1 << 16) fault(m, tid, line, at, "an address near zero");
    if (at % size) fault(m, tid, line, at, "a misaligned address");
    if (outside && (outside((void *)at) || outside((void *)(at + size - 1))))
        fault(m, tid, line, at, "an address outside an allocation");
    return (uint8_t *)at;
}
static inline void global_read(Machine *m, int tid, int line, uint64_t at, int size) {
    is_read(m, tid, line, at, slot(writes, at), slot(reads, at));
}
static inline void global_written(Machine *m, int tid, int line, uint64_t at, int size, uint64_t value) {
    is_written(m, tid, line, at, value, slot(writes, at), slot(reads, at));
}

static inline uint8_t *shared_at(Machine *m, int tid, int line, uint64_t at, int size) {
    uint64_t place = (uint32_t)at - SHARED;
    if (place % size) fault(m, tid, line, at, "a misaligned shared address");
    if (place + size > (uint64_t)m->shared_size) {
        fault(m, tid, line, at, "an address outside shared memory");
        return m->shared; /* of a warp's own work, which goes on */
    }
    return m->shared + place;
}
static inline void shared_read(Machine *m, int tid, int line, uint64_t at, int size) {
    for (uint64_t k = (uint32_t)at - SHARED, end = k + size; k < end; k++)
        is_read(m, tid, line, SHARED + k, m->shared_writes + k, m->shared_reads + k);
}
static inline void shared_written(Machine *m, int tid, int line, uint64_t at, int size, uint64_t value) {
    for (uint64_t k = (uint32_t)at - SHARED, end = k + size; k < end; k++, value >>= 8)
        is_written(m, tid, line, SHARED + k, value & 255, m->shared_writes + k, m->shared_reads + k);
}
static inline uint32_t added(Machine *m, int tid, int line, uint64_t at, uint32_t more) {
    uint8_t *place = shared_at(m, tid, line, at, 4);
    uint32_t before, after;
    memcpy(&before, place, 4);
    after = before + more;
    memcpy(place, &after, 4);
    return before;
}

/* ---- threads together ---- */

static void wait_for_others(Machine *m, int tid, int line, int state) {
    m->lanes[tid].state = state;
    m->lanes[tid].line = line;
    leave(m, tid);
}
static void barrier(Machine *m, int tid, int line) { wait_for_others(m, tid, line, AT_BARRIER); }

static uint32_t together(Machine *m, int tid, int line, int what, uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
    Lane *lane = m->lanes + tid;
    if (mask != ~0u) fault(m, tid, line, 0, "a part of a warp");
    lane->what = what, lane->in[0] = a, lane->in[1] = b, lane->in[2] = c;
    wait_for_others(m, tid, line, AT_WARP);
    return lane->out[0];
}
static void load_matrices(Machine *m, int tid, int line, uint64_t at) {
    m->lanes[tid].what = LOAD_MATRICES, m->lanes[tid].at = at;
    wait_for_others(m, tid, line, AT_WARP);
}
static void multiply_matrices(Machine *m, int tid, int line, uint32_t *given) {
    m->lanes[tid].what = MULTIPLY_MATRICES;
    memcpy(m->lanes[tid].in, given, 40);
    wait_for_others(m, tid, line, AT_WARP);
}

static uint32_t shuffled(Lane *warp, int lane) {
    uint32_t b = warp[lane].in[1] & 31, end = warp[lane].in[2] & 31, segment = warp[lane].in[2] >> 8 & 31;
    int from, last = (lane & segment) | (end & ~segment), valid;
    switch (warp[lane].what) {
    case SHFL_UP: from = lane - (int)b; valid = from >= last; break;
    case SHFL_DOWN: from = lane + (int)b; valid = from <= last; break;
    case SHFL_BFLY: from = lane ^ (int)b; valid = from <= last; break;
    default: from = (lane & segment) | (b & ~segment); valid = from <= last;
    }
    return warp[valid ? from : lane].in[0];
}

/* ldmatrix .x4: lane 8 k + r gives the address of row r of matrix k; each lane gets two of its 16-bit values. */
static void loaded(Machine *m, int first, int lane) {
    Lane *warp = m->lanes + first, *mine = warp + lane;
    for (int k = 0; k < 4; k++) {
        uint64_t row = warp[8 * k + lane / 4].at;
        uint8_t *p = shared_at(m, first + lane, mine->line, row, 16);
        if (m->failed) return;
        shared_read(m, first + lane, mine->line, row + lane % 4 * 4, 4);
        memcpy(&mine->out[k], p + lane % 4 * 4, 4);
    }
}

/* mma.m16n8k32 of bytes: a lane holds four of a row's bytes of A in each of its four registers, of a column's of B in
two, and of the sums two neighbours in each of two rows. */
static void multiplied(Lane *warp, int lane) {
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        int64_t sum = (int32_t)warp[lane].in[6 + i];
        for (int k = 0; k < 32; k++) {
            int8_t a = warp[row % 8 * 4 + k % 16 / 4].in[row / 8 + k / 16 * 2] >> k % 4 * 8;
            int8_t b = warp[column * 4 + k % 16 / 4].in[4 + k / 16] >> k % 4 * 8;
            sum += a * b;
        }
        warp[lane].out[i] = (int32_t)saturated(sum, -2147483648.0, 2147483648.0);
    }
}

static void meet(Machine *m, int first) {
    Lane *warp = m->lanes + first;
    uint32_t sum = 0, ballot = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (warp[lane].line != warp->line) fault(m, first + lane, warp[lane].line, 0, "a warp meets at unlike instructions");
        sum += warp[lane].in[0];
        ballot |= (uint32_t)(warp[lane].in[0] != 0) << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
        switch (warp[lane].what) {
        case SUM: warp[lane].out[0] = sum; break;
        case BALLOT: warp[lane].out[0] = ballot; break;
        case LOAD_MATRICES: loaded(m, first, lane); break;
        case MULTIPLY_MATRICES: multiplied(warp, lane); break;
        default: warp[lane].out[0] = shuffled(warp, lane);
        }
        warp[lane].state = RUNS;
    }
}

static void thread(Machine *m, int tid) {
/* what a thread does */
}

static void begin(unsigned low, unsigned high, int tid) {
    Machine *m = (Machine *)((uint64_t)high << 32 | low);
    thread(m, tid);
    wait_for_others(m, tid, 0, ENDED);
}

static void any_order(Machine *m, uint32_t *order, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) order[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        m->draw = m->draw * 6364136223846793005ull + 1442695040888963407ull;
        uint32_t j = (m->draw >> 33) % i, last = order[i - 1];
        order[i - 1] = order[j], order[j] = last;
    }
}

static void run_block(Machine *m) {
    uint32_t order[MOST_THREADS];
    m->phase = 0;
    memset(m->shared, 0xcd, m->shared_size);
    memset(m->shared_writes, 0xff, m->shared_size * sizeof(Seen)); /* by thread -1 */
    memset(m->shared_reads, 0xff, m->shared_size * sizeof(Seen));
    for (int tid = 0; tid < m->threads; tid++) {
        ucontext_t *context = &m->lanes[tid].start;
        getcontext(context);
        context->uc_stack.ss_sp = stacks + (size_t)tid * STACK;
        context->uc_stack.ss_size = STACK;
        makecontext(context, (void (*)(void))begin, 3, (unsigned)(uint64_t)m, (unsigned)((uint64_t)m >> 32), tid);
        m->lanes[tid].state = RUNS, m->lanes[tid].started = 0;
    }
    for (;;) {
        int moved = 0, count[4] = {0};
        any_order(m, order, m->threads);
        for (int i = 0; i < m->threads; i++) {
            if (m->lanes[order[i]].state != RUNS) continue;
            moved = 1;
            m->running = order[i];
            enter(m, order[i]);
            m->running = -1;
            if (m->failed) return;
        }
        for (int first = 0; first < m->threads; first += 32) {
            int here = 0;
            for (int lane = 0; lane < 32; lane++) here += m->lanes[first + lane].state == AT_WARP;
            if (here == 32) meet(m, first), moved = 1;
        }
        for (int tid = 0; tid < m->threads; tid++) count[m->lanes[tid].state]++;
        if (m->failed || count[ENDED] == m->threads) return;
        if (count[AT_BARRIER] == m->threads) {
            for (int tid = 0; tid < m->threads; tid++) {
                if (m->lanes[tid].line != m->lanes->line) fault(m, tid, m->lanes[tid].line, 0, "threads meet at unlike barriers");
                m->lanes[tid].state = RUNS;
            }
            m->phase++, moved = 1;
        }
        if (!moved) fault(m, 0, 0, 0, "some threads wait for others that do not come");
        if (m->failed) return;
    }
}

/* 0, or 1 with a message of up to 300 characters. One launch at a time, each with a number of its own; tables: 0 at
first, 2 x SLOTS x 32 bytes that all kernels share. */
int launch(uint64_t *parameters, uint32_t *grid, int threads, int shared_size, uint32_t number, void *tables,
           uint64_t *notes, char *message) {
    writes = tables, reads = writes + SLOTS;
    if (!stacks) {
        stacks = mmap(0, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        outside = dlsym(RTLD_DEFAULT, "__asan_address_is_poisoned");
    }
    Machine *m = calloc(1, sizeof(Machine));
    m->parameters = parameters, m->threads = threads, m->shared_size = shared_size, m->draw = number, m->message = message;
    m->running = -1, m->launch = number, m->notes = notes;
    m->shared = aligned_alloc(128, (shared_size + 255) / 128 * 128);
    m->shared_writes = calloc(shared_size + 1, sizeof(Seen)), m->shared_reads = calloc(shared_size + 1, sizeof(Seen));
    m->lanes = calloc(threads, sizeof(Lane));
    uint32_t blocks = grid[0] * grid[1] * grid[2], *order = malloc((blocks + 1) * sizeof(uint32_t));
    memcpy(m->nctaid, grid, sizeof m->nctaid);
    any_order(m, order, blocks);
    for (uint32_t i = 0; i < blocks && !m->failed; i++) {
        m->block = order[i];
        m->ctaid[0] = m->block % grid[0], m->ctaid[1] = m->block / grid[0] % grid[1], m->ctaid[2] = m->block / grid[0] / grid[1];
        run_block(m);
    }
    int failed = m->failed;
    free(order), free(m->lanes), free(m->shared_reads), free(m->shared_writes), free(m->shared), free(m);
    return failed;
}
