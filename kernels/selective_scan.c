/* The selective scan on a CPU, forward and backward, as chapters 09 and 11 have it.
 *
 * A work item is WIDTH neighbouring channels of one group, through some of the sequences (batch entries, or documents
 * of a packed row): channels side by side in the lanes of the vector unit, time in sequence. It takes STRIDE steps at
 * a time and goes through them with one state after another: the cache holds that, however many states there are. To
 * memory go only the states between such chunks, for the backward pass, which makes the others again. Threads take
 * items from a shared counter; no two write to one address, and the caller sums over items, so the bits do not depend
 * on who took what. Compiled by minimamba/_compiler.py with -DREAL=float, and once more with -DREAL=double.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH 32
#define STRIDE 32

/* Sequence s is rows borders[s] to borders[s + 1] of the flat arrays: (rows, D) for u and its like, (rows, G, N) for
 * varying B and C. Constant B and C are (D, N) like A. All contiguous; what is not given is NULL. */
typedef struct {
    int64_t sequences, rows, channels, states, groups, softplus, B_varying, C_varying;
    int64_t parts; /* that the sequences are dealt to, 1 to `sequences`; a part and a block are a work item */
    const int64_t *borders;
    const REAL *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state; /* initial_state (sequences, D, N) */
    REAL *y, *final_state;   /* (rows, D), (sequences, D, N) */
    REAL *checkpoints;       /* (rows / STRIDE + sequences, N, D), or NULL: nothing is kept */
    const REAL *grad_y, *grad_final_state;
    REAL *du, *ddelta, *dz;                 /* (rows, D) */
    REAL *dinitial_state;                   /* (sequences, D, N) */
    REAL *dA, *dD, *ddelta_bias;            /* (parts, D, N), (parts, D), (parts, D), for the caller to sum */
    REAL *dB, *dC;                          /* varying: (blocks of a group, rows, G, N); constant: as dA */
} Scan;

/* --- elementary functions, written so that a loop over channels becomes vector instructions ------------------ */

#define IS_DOUBLE (sizeof(REAL) == 8)
#define LOG2_E ((REAL)1.4426950408889634)
#define LN_2 ((REAL)0.6931471805599453)

/* 2^f for |f| <= 1/2. In float 1 + f q(f) with the q of degree 4 whose largest relative error is smallest, 9e-8; in
 * double the Taylor series up to f^12, 2e-16. */
static inline REAL exp2_of_fraction(REAL f)
{
    REAL p;
    if (IS_DOUBLE) {
        p = (REAL)2.5678435993488206e-11;
        p = p * f + (REAL)4.4455382718708110e-10;
        p = p * f + (REAL)7.0549116208011233e-9;
        p = p * f + (REAL)1.0178086009239700e-7;
        p = p * f + (REAL)1.3215486790144309e-6;
        p = p * f + (REAL)1.5252733804059840e-5;
        p = p * f + (REAL)1.5403530393381609e-4;
        p = p * f + (REAL)1.3333558146428443e-3;
        p = p * f + (REAL)9.6181291076284772e-3;
        p = p * f + (REAL)5.5504108664821580e-2;
        p = p * f + (REAL)2.4022650695910071e-1;
        p = p * f + LN_2;
    } else {
        p = (REAL)1.3264727e-3;
        p = p * f + (REAL)9.6715126e-3;
        p = p * f + (REAL)5.5507337e-2;
        p = p * f + (REAL)2.4022242e-1;
        p = p * f + (REAL)6.9314698e-1;
    }
    return p * f + 1;
}

/* 2^x = 2^i 2^f with i the nearest integer: adding 1.5 times 2^(digits of the fraction) leaves i in the last bits, from
 * where it moves into the bits of the exponent. 0 below the smallest normal number, infinity above the largest, NaN
 * for NaN, but also for an infinite x. i is kept within bounds as an integer: that is one instruction, while compilers
 * take four for the same with numbers that may be NaN. */
static inline REAL exp2_of(REAL x)
{
    const REAL magic = IS_DOUBLE ? (REAL)6755399441055744.0 : (REAL)12582912.0;
    const REAL shifted = x + magic, f = x - (shifted - magic);
#define SCALE_BY_BITS(INTEGER, FRACTION, BIAS) \
    INTEGER bits, zero; \
    memcpy(&bits, &shifted, sizeof bits); \
    memcpy(&zero, &magic, sizeof zero); \
    bits = bits < zero - BIAS ? zero - BIAS : bits; \
    bits = bits > zero + BIAS + 1 ? zero + BIAS + 1 : bits; \
    bits = (bits - zero + BIAS) << FRACTION; \
    REAL scale; \
    memcpy(&scale, &bits, sizeof scale); \
    return exp2_of_fraction(f) * scale
    if (IS_DOUBLE) {
        SCALE_BY_BITS(int64_t, 52, 1023);
    } else {
        SCALE_BY_BITS(int32_t, 23, 127);
    }
}

/* log(1 + e) for 0 <= e <= 1, with all its digits for small e: 2 artanh(s), s = e / (2 + e) <= 1/3. */
static inline REAL log1p_of(REAL e)
{
    const REAL s = e / (2 + e), q = s * s;
    REAL p = (REAL)1 / 15;
    if (IS_DOUBLE) {
        p = (REAL)1 / 33;
        p = p * q + (REAL)1 / 31;
        p = p * q + (REAL)1 / 29;
        p = p * q + (REAL)1 / 27;
        p = p * q + (REAL)1 / 25;
        p = p * q + (REAL)1 / 23;
        p = p * q + (REAL)1 / 21;
        p = p * q + (REAL)1 / 19;
        p = p * q + (REAL)1 / 17;
        p = p * q + (REAL)1 / 15;
    }
    p = p * q + (REAL)1 / 13;
    p = p * q + (REAL)1 / 11;
    p = p * q + (REAL)1 / 9;
    p = p * q + (REAL)1 / 7;
    p = p * q + (REAL)1 / 5;
    p = p * q + (REAL)1 / 3;
    return 2 * s * (p * q + 1);
}

/* The bound makes it right for infinities as well: exp(-2e4) is 0. */
static inline REAL exp_of_minus_abs(REAL x)
{
    x = x < 0 ? x : -x;
    return exp2_of(LOG2_E * (x < -20000 ? -20000 : x));
}

static inline REAL sigmoid(REAL x)
{
    const REAL e = exp_of_minus_abs(x);
    return (x < 0 ? e : 1) / (1 + e);
}

/* --- one block of channels ----------------------------------------------------------------------------------- */

/* Over the lanes. The pragma promises the compiler that they are independent. */
#define PRAGMA(x) _Pragma(#x)
#define EACH PRAGMA(omp simd) for (int w = 0; w < WIDTH; w++)

typedef struct {
    int64_t part, group, block; /* block: within the group */
    int64_t d;                  /* the first channel */
    int width;                  /* channels, at most WIDTH; the rest of the lanes is zero */
    int64_t sequence, start, stop;
} Item;

static int64_t blocks_of(const Scan *p)
{
    return (p->channels / p->groups + WIDTH - 1) / WIDTH;
}

static Item item_of(const Scan *p, int64_t i)
{
    Item it;
    const int64_t blocks = blocks_of(p), size = p->channels / p->groups;
    it.block = i % blocks;
    it.group = i / blocks % p->groups;
    it.part = i / (blocks * p->groups);
    it.d = it.group * size + it.block * WIDTH;
    it.width = size - it.block * WIDTH < WIDTH ? (int)(size - it.block * WIDTH) : WIDTH;
    return it;
}

/* The sequences of a part: every p->parts-th one. */
#define EACH_SEQUENCE(p, it) for (it.sequence = it.part; it.sequence < (p)->sequences; it.sequence += (p)->parts)

static inline void begin_sequence(const Scan *p, Item *it)
{
    it->start = p->borders[it->sequence];
    it->stop = p->borders[it->sequence + 1];
}

/* Rows of `width` neighbouring numbers, and blocks (D, N) turned to [N][WIDTH]. */
static inline void load_row(REAL *out, const REAL *row, int width)
{
    if (row && width == WIDTH) {
        memcpy(out, row, WIDTH * sizeof(REAL));
    } else {
        EACH out[w] = row && w < width ? row[w] : 0;
    }
}

static inline void store_row(REAL *row, const REAL *in, int width)
{
    memcpy(row, in, width * sizeof(REAL));
}

static void load_block(REAL *restrict out, const REAL *restrict block, int64_t states, int width, REAL factor)
{
    if (!block || width < WIDTH)
        memset(out, 0, states * WIDTH * sizeof(REAL));
    for (int w = 0; block && w < width; w++)
        for (int64_t n = 0; n < states; n++)
            out[n * WIDTH + w] = block[w * states + n] * factor;
}

static void store_block(REAL *restrict block, const REAL *restrict in, int64_t states, int width)
{
    for (int w = 0; w < width; w++)
        for (int64_t n = 0; n < states; n++)
            block[w * states + n] = in[n * WIDTH + w];
}

static inline const REAL *offset(const REAL *array, int64_t by)
{
    return array ? array + by : NULL;
}

/* What one step has for all the states of a block. */
typedef struct {
    REAL u[WIDTH], delta[WIDTH], slope[WIDTH]; /* Δ after the softplus, and the slope of that */
    REAL inflow[WIDTH], y[WIDTH];              /* Δ u; the output before the gate */
    REAL decay[WIDTH], before[WIDTH];          /* of one state: exp(Δ A), and the state before the step */
    REAL dy[WIDTH], dz[WIDTH];
    REAL through_A[WIDTH], through_B[WIDTH]; /* sums over the states of what reaches Δ A and Δ u */
} Step;

typedef struct {
    _Alignas(64) Step step[STRIDE + 1]; /* the last one has only `before` */
    int steps;                          /* STRIDE, or less at the end of a sequence */
    int64_t first;
} Chunk;

/* Read what does not depend on the state. */
static void load_chunk(Chunk *c, const Scan *p, const Item *it, int64_t chunk, const REAL *bias, const REAL *D)
{
    c->first = it->start + chunk * STRIDE;
    c->steps = it->stop - c->first < STRIDE ? (int)(it->stop - c->first) : STRIDE;
    for (int i = 0; i < c->steps; i++) {
        Step *s = &c->step[i];
        const int64_t row = (c->first + i) * p->channels + it->d;
        REAL raw[WIDTH], e[WIDTH];
        load_row(s->u, p->u + row, it->width);
        load_row(raw, p->delta + row, it->width);
        EACH raw[w] += bias[w];
        if (p->softplus) {
            EACH e[w] = exp_of_minus_abs(raw[w]);
            EACH s->delta[w] = (raw[w] < 0 ? 0 : raw[w]) + log1p_of(e[w]);
            if (p->grad_y)
                EACH s->slope[w] = (raw[w] < 0 ? e[w] : 1) / (1 + e[w]);
        } else {
            EACH s->delta[w] = raw[w];
            EACH s->slope[w] = 1;
        }
        EACH s->inflow[w] = s->delta[w] * s->u[w];
        EACH s->y[w] = D[w] * s->u[w];
    }
}

/* State n of the block before this chunk, for all channels: where it is kept. */
static inline REAL *checkpoint(const Scan *p, const Item *it, int64_t chunk, int64_t n)
{
    return p->checkpoints + ((it->start / STRIDE + it->sequence + chunk) * p->states + n) * p->channels + it->d;
}

/* B and C of state n at step i of the chunk, for lane w: one number a step if varying, else one a channel. */
#define MAPS_OF_STATE \
    const int64_t next = p->groups * states, here = c->first * next + it.group * states + n; \
    const REAL *restrict B_n = B_varying ? p->B + here : B + n * WIDTH; \
    const REAL *restrict C_n = C_varying ? p->C + here : C + n * WIDTH
#define B_AT (B_varying ? B_n[i * next] : B_n[w])
#define C_AT (C_varying ? C_n[i * next] : C_n[w])

/* --- forward -------------------------------------------------------------------------------------------------- */

static inline __attribute__((always_inline)) void forward_item(
    const Scan *p, Item it, Chunk *restrict c, REAL *restrict scratch, const int B_varying, const int C_varying)
{
    const int64_t states = p->states, block = states * WIDTH;
    REAL *restrict A = scratch, *restrict h = A + block, *restrict B = h + block, *restrict C = B + block;
    REAL z[WIDTH], D[WIDTH], bias[WIDTH];
    load_block(A, p->A + it.d * states, states, it.width, LOG2_E);
    load_block(B, B_varying ? NULL : p->B + it.d * states, states, it.width, 1);
    load_block(C, C_varying ? NULL : p->C + it.d * states, states, it.width, 1);
    load_row(D, offset(p->D, it.d), it.width);
    load_row(bias, offset(p->delta_bias, it.d), it.width);

    EACH_SEQUENCE(p, it) {
        const int64_t whole = (it.sequence * p->channels + it.d) * states; /* in a (sequences, D, N) array */
        begin_sequence(p, &it);
        load_block(h, offset(p->initial_state, whole), states, it.width, 1);
        for (int64_t chunk = 0; it.start + chunk * STRIDE < it.stop; chunk++) {
            load_chunk(c, p, &it, chunk, bias, D);
            for (int64_t n = 0; n < states; n++) {
                MAPS_OF_STATE;
                const REAL *A_n = A + n * WIDTH;
                REAL *restrict h_n = h + n * WIDTH;
                if (p->checkpoints)
                    store_row(checkpoint(p, &it, chunk, n), h_n, it.width);
                for (int i = 0; i < c->steps; i++) {
                    Step *s = &c->step[i];
                    EACH {
                        h_n[w] = exp2_of(s->delta[w] * A_n[w]) * h_n[w] + s->inflow[w] * B_AT;
                        s->y[w] += h_n[w] * C_AT;
                    }
                }
            }
            for (int i = 0; i < c->steps; i++) {
                REAL *y = c->step[i].y;
                const int64_t row = (c->first + i) * p->channels + it.d;
                if (p->z) {
                    load_row(z, p->z + row, it.width);
                    EACH y[w] *= z[w] * sigmoid(z[w]);
                }
                store_row(p->y + row, y, it.width);
            }
        }
        store_block(p->final_state + whole, h, states, it.width);
    }
}

/* --- backward ------------------------------------------------------------------------------------------------- */

static inline void add_neighbours(REAL *restrict out, const REAL *restrict in, int64_t count)
{
    PRAGMA(omp simd) for (int64_t i = 0; i < count; i++)
        out[i] = in[2 * i] + in[2 * i + 1];
}

/* out[i * next] = the sum of row i of [rows][WIDTH]: its halves, then neighbours are added until one number is left. */
static inline void store_sums(REAL *out, int64_t next, REAL *rows_in, int64_t rows)
{
    _Alignas(64) REAL half[STRIDE * WIDTH / 2];
    REAL *in = half, *sums = rows_in;
    for (int64_t i = 0; i < rows; i++)
        PRAGMA(omp simd) for (int w = 0; w < WIDTH / 2; w++)
            half[i * (WIDTH / 2) + w] = rows_in[i * WIDTH + w] + rows_in[i * WIDTH + WIDTH / 2 + w];
    for (int64_t left = rows * WIDTH / 4; left >= rows; left /= 2) {
        add_neighbours(sums, in, left);
        REAL *other = in;
        in = sums;
        sums = other;
    }
    for (int64_t i = 0; i < rows; i++)
        out[i * next] = in[i];
}

/* With g_t = C_t dy_t + Ā_{t+1} g_{t+1} (chapter 09), from the last chunk to the first: the states of the chunk again,
 * from its checkpoint, then the adjoint back through it. */
static inline __attribute__((always_inline)) void backward_item(
    const Scan *p, Item it, Chunk *restrict c, REAL *restrict scratch, const int B_varying, const int C_varying)
{
    const int64_t states = p->states, block = states * WIDTH;
    REAL *restrict A = scratch, *restrict B = A + block, *restrict C = B + block;
    REAL *restrict carry = C + block; /* Ā_{t+1} g_{t+1} */
    REAL *restrict dA = carry + block, *restrict dB = dA + block, *restrict dC = dB + block;
    _Alignas(64) REAL dB_lanes[STRIDE * WIDTH], dC_lanes[STRIDE * WIDTH];
    REAL z[WIDTH], D[WIDTH], bias[WIDTH], dD[WIDTH] = {0}, dbias[WIDTH] = {0};
    load_block(A, p->A + it.d * states, states, it.width, LOG2_E);
    load_block(B, B_varying ? NULL : p->B + it.d * states, states, it.width, 1);
    load_block(C, C_varying ? NULL : p->C + it.d * states, states, it.width, 1);
    load_row(D, offset(p->D, it.d), it.width);
    load_row(bias, offset(p->delta_bias, it.d), it.width);
    memset(dA, 0, 3 * block * sizeof(REAL)); /* dA, dB, dC */

    EACH_SEQUENCE(p, it) {
        const int64_t whole = (it.sequence * p->channels + it.d) * states;
        begin_sequence(p, &it);
        load_block(carry, offset(p->grad_final_state, whole), states, it.width, 1);
        for (int64_t chunk = (it.stop - it.start + STRIDE - 1) / STRIDE - 1; chunk >= 0; chunk--) {
            load_chunk(c, p, &it, chunk, bias, D);
            for (int i = 0; i < c->steps; i++) {
                Step *s = &c->step[i];
                const int64_t row = (c->first + i) * p->channels + it.d;
                load_row(s->dy, p->grad_y + row, it.width);
                if (p->z) { /* y = out silu(z) */
                    load_row(z, p->z + row, it.width);
                    EACH {
                        const REAL gate = sigmoid(z[w]);
                        s->dz[w] = s->dy[w] * gate * (1 + z[w] * (1 - gate));
                        s->dy[w] *= z[w] * gate;
                    }
                }
                EACH s->through_A[w] = s->through_B[w] = 0;
            }

            for (int64_t n = 0; n < states; n++) {
                MAPS_OF_STATE;
                const REAL *restrict A_n = A + n * WIDTH;
                REAL *restrict carry_n = carry + n * WIDTH, *restrict dA_n = dA + n * WIDTH;
                REAL *restrict dB_n = dB + n * WIDTH, *restrict dC_n = dC + n * WIDTH;
                load_row(c->step[0].before, checkpoint(p, &it, chunk, n), it.width);
                for (int i = 0; i < c->steps; i++) {
                    Step *s = &c->step[i];
                    EACH {
                        const REAL decay = exp2_of(s->delta[w] * A_n[w]);
                        const REAL h = decay * s->before[w] + s->inflow[w] * B_AT;
                        s->decay[w] = decay;
                        s[1].before[w] = h;
                        s->y[w] += h * C_AT;
                    }
                }
                for (int i = c->steps - 1; i >= 0; i--) {
                    Step *s = &c->step[i];
                    REAL *to_B = B_varying ? dB_lanes + i * WIDTH : dB_n;
                    REAL *to_C = C_varying ? dC_lanes + i * WIDTH : dC_n;
                    EACH {
                        const REAL g = carry_n[w] + s->dy[w] * C_AT;
                        const REAL back = s->decay[w] * g;
                        const REAL ga = back * s->before[w]; /* g_t Ā_t h_{t-1}: what reaches Δ A */
                        s->through_A[w] += ga * A_n[w];
                        s->through_B[w] += g * B_AT;
                        dA_n[w] += ga * s->delta[w];
                        carry_n[w] = back;
                        to_B[w] = g * s->inflow[w] + (B_varying ? 0 : to_B[w]);
                        to_C[w] = s->dy[w] * s[1].before[w] + (C_varying ? 0 : to_C[w]);
                    }
                }
                const int64_t part = it.block * p->rows * next + here;
                if (B_varying)
                    store_sums(p->dB + part, next, dB_lanes, c->steps);
                if (C_varying)
                    store_sums(p->dC + part, next, dC_lanes, c->steps);
            }

            for (int i = 0; i < c->steps; i++) {
                Step *s = &c->step[i];
                const int64_t row = (c->first + i) * p->channels + it.d;
                REAL du[WIDTH], ddelta[WIDTH];
                EACH {
                    du[w] = s->through_B[w] * s->delta[w] + D[w] * s->dy[w];
                    /* A holds log2(e) times A */
                    ddelta[w] = (s->through_A[w] * LN_2 + s->through_B[w] * s->u[w]) * s->slope[w];
                    dD[w] += s->dy[w] * s->u[w];
                    dbias[w] += ddelta[w];
                }
                store_row(p->du + row, du, it.width);
                store_row(p->ddelta + row, ddelta, it.width);
                if (p->z) {
                    EACH s->dz[w] *= s->y[w];
                    store_row(p->dz + row, s->dz, it.width);
                }
            }
        }
        store_block(p->dinitial_state + whole, carry, states, it.width);
    }

    const int64_t own = it.part * p->channels + it.d;
    store_block(p->dA + own * states, dA, states, it.width);
    if (!B_varying)
        store_block(p->dB + own * states, dB, states, it.width);
    if (!C_varying)
        store_block(p->dC + own * states, dC, states, it.width);
    if (p->D)
        store_row(p->dD + own, dD, it.width);
    if (p->delta_bias)
        store_row(p->ddelta_bias + own, dbias, it.width);
}

/* --- what Python calls ----------------------------------------------------------------------------------------- */

/* With OpenMP `threads` threads of the pool that PyTorch's own operations use take items until none is left; without
 * it only the calling one does, and others have to call. Returns 0, or -1 if there is no memory for scratch space. */
int scan_has_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

#define DEFINE_RUN(NAME, ITEM, BLOCKS) \
    static int NAME##_items(const Scan *p, int64_t *next) \
    { \
        void *memory = malloc((size_t)(BLOCKS) * p->states * WIDTH * sizeof(REAL) + 64); \
        if (!memory) \
            return -1; \
        REAL *scratch = (REAL *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); \
        Chunk chunk; \
        const int64_t items = p->parts * p->groups * blocks_of(p); \
        for (;;) { \
            const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); \
            if (i >= items) \
                break; \
            const Item it = item_of(p, i); \
            if (p->B_varying && p->C_varying) \
                ITEM(p, it, &chunk, scratch, 1, 1); \
            else if (p->B_varying) \
                ITEM(p, it, &chunk, scratch, 1, 0); \
            else if (p->C_varying) \
                ITEM(p, it, &chunk, scratch, 0, 1); \
            else \
                ITEM(p, it, &chunk, scratch, 0, 0); \
        } \
        free(memory); \
        return 0; \
    } \
    int NAME(const Scan *p, int64_t *next, int threads) \
    { \
        int failed = 0; \
        PRAGMA(omp parallel num_threads(threads) reduction(| : failed)) \
        failed |= NAME##_items(p, next); \
        return failed; \
    }

DEFINE_RUN(scan_forward, forward_item, 4)
DEFINE_RUN(scan_backward, backward_item, 7)
