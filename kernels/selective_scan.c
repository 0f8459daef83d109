/* The selective scan on a CPU, forward and backward, as chapters 09 and 11 have it.
 *
 * One work item is a block of WIDTH neighbouring channels of one group, for one sequence (a batch entry, or a
 * document of a packed row). It walks through time with the state h[N][WIDTH] in the cache: time in sequence,
 * channels side by side in the lanes of the vector unit. Nothing with a state axis goes to memory but one state in
 * STRIDE steps, for the backward pass, which makes the others again.
 * Threads take items from a shared counter. No two items write to one address and sums over items are made by the
 * caller, so the bits do not depend on who took what.
 *
 * Compiled by minimamba/_compiler.py with -DREAL=float, and once more with -DREAL=double.
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
    const int64_t *borders;
    const REAL *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state; /* initial_state (sequences, D, N) */
    REAL *y, *final_state;   /* (rows, D), (sequences, D, N) */
    REAL *checkpoints;       /* (rows / STRIDE + sequences, N, D), or NULL: nothing is kept */
    const REAL *grad_y, *grad_final_state;
    REAL *du, *ddelta, *dz;                 /* (rows, D) */
    REAL *dA, *dinitial_state;              /* (sequences, D, N), for the caller to sum */
    REAL *dB, *dC;                          /* varying: (blocks of a group, rows, G, N); constant: as dA */
    REAL *dD, *ddelta_bias;                 /* (sequences, D) */
} Scan;

/* --- elementary functions, written so that a loop over channels becomes vector instructions ------------------ */

#define IS_DOUBLE (sizeof(REAL) == 8)
#define LOG2_E ((REAL)1.4426950408889634)
#define LN_2 ((REAL)0.6931471805599453)

/* 2^x = 2^i 2^f with i the nearest integer and |f| <= 1/2. 2^f is its Taylor series, up to f^6 in float (relative
 * error 1.2e-7) and f^12 in double (1.7e-16); i goes into the bits of the exponent. 0 below the smallest normal
 * number, infinity above the largest, NaN for NaN: the comparisons keep it. */
static inline REAL exp2_of(REAL x)
{
    const REAL low = IS_DOUBLE ? -1023 : -127, high = IS_DOUBLE ? 1024 : 128;
    x = low > x ? low : x;
    x = high < x ? high : x;
    /* Adding 1.5 times 2^(digits of the fraction) leaves i in the last bits. */
    const REAL magic = IS_DOUBLE ? (REAL)6755399441055744.0 : (REAL)12582912.0;
    const REAL shifted = x + magic, f = x - (shifted - magic);
    REAL p = (REAL)1.5403530393381609e-4; /* (ln 2)^6 / 6! */
    if (IS_DOUBLE) {
        p = (REAL)2.5678435993488206e-11;
        p = p * f + (REAL)4.4455382718708110e-10;
        p = p * f + (REAL)7.0549116208011233e-9;
        p = p * f + (REAL)1.0178086009239700e-7;
        p = p * f + (REAL)1.3215486790144309e-6;
        p = p * f + (REAL)1.5252733804059840e-5;
        p = p * f + (REAL)1.5403530393381609e-4;
    }
    p = p * f + (REAL)1.3333558146428443e-3;
    p = p * f + (REAL)9.6181291076284772e-3;
    p = p * f + (REAL)5.5504108664821580e-2;
    p = p * f + (REAL)2.4022650695910071e-1;
    p = p * f + LN_2;
    p = p * f + 1;
#define SCALE_BY_BITS(INTEGER, FRACTION, BIAS) \
    INTEGER bits; \
    memcpy(&bits, &shifted, sizeof bits); \
    bits = (bits << FRACTION) + ((INTEGER)BIAS << FRACTION); \
    REAL scale; \
    memcpy(&scale, &bits, sizeof scale); \
    return p * scale
    if (IS_DOUBLE) {
        SCALE_BY_BITS(uint64_t, 52, 1023);
    } else {
        SCALE_BY_BITS(uint32_t, 23, 127);
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

static inline REAL exp_of_minus_abs(REAL x)
{
    return exp2_of(LOG2_E * (x < 0 ? x : -x));
}

static inline REAL softplus(REAL x)
{
    return (x < 0 ? 0 : x) + log1p_of(exp_of_minus_abs(x));
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
#define EACH_SUM(A, B) PRAGMA(omp simd reduction(+ : A, B)) for (int w = 0; w < WIDTH; w++)

typedef struct {
    int64_t sequence, group, block, start, stop; /* block: within the group */
    int64_t d;                                   /* the first channel */
    int width;                                   /* channels, at most WIDTH; the rest of the lanes is zero */
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
    it.sequence = i / (blocks * p->groups);
    it.start = p->borders[it.sequence];
    it.stop = p->borders[it.sequence + 1];
    it.d = it.group * size + it.block * WIDTH;
    it.width = size - it.block * WIDTH < WIDTH ? (int)(size - it.block * WIDTH) : WIDTH;
    return it;
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

static void load_block(REAL *out, const REAL *block, int64_t states, int width, REAL factor)
{
    for (int64_t n = 0; n < states; n++)
        EACH out[n * WIDTH + w] = block && w < width ? block[w * states + n] * factor : 0;
}

static void store_block(REAL *block, const REAL *in, int64_t states, int width)
{
    for (int64_t n = 0; n < states; n++)
        for (int w = 0; w < width; w++)
            block[w * states + n] = in[n * WIDTH + w];
}

static inline const REAL *offset(const REAL *array, int64_t by)
{
    return array ? array + by : NULL;
}

/* The step size of a row: Δ, or softplus(Δ + bias). `raw` is what the softplus is taken of. */
static inline void step_of(REAL *step, REAL *raw, const REAL *bias, const Scan *p, const Item *it, int64_t t)
{
    load_row(raw, p->delta + t * p->channels + it->d, it->width);
    EACH raw[w] += bias[w];
    if (p->softplus)
        EACH step[w] = softplus(raw[w]);
    else
        EACH step[w] = raw[w];
}

/* --- forward -------------------------------------------------------------------------------------------------- */

/* B and C at state n and lane w: one number of the row if varying, else one of the block. */
#define B_AT (B_varying ? B_row[n] : B_block[n * WIDTH + w])
#define C_AT (C_varying ? C_row[n] : C_block[n * WIDTH + w])

static inline __attribute__((always_inline)) void forward_item(
    const Scan *p, Item it, REAL *restrict scratch, const int B_varying, const int C_varying)
{
    const int64_t states = p->states, block = states * WIDTH;
    REAL *restrict A = scratch, *restrict h = A + block, *restrict B_block = h + block, *restrict C_block = B_block + block;
    REAL u[WIDTH], raw[WIDTH], step[WIDTH], inflow[WIDTH], y[WIDTH], z[WIDTH], D[WIDTH], bias[WIDTH];
    const int64_t whole = it.sequence * p->channels + it.d; /* first row of a (sequences, D, N) array */
    load_block(A, p->A + it.d * states, states, it.width, LOG2_E);
    load_block(h, offset(p->initial_state, whole * states), states, it.width, 1);
    load_block(B_block, B_varying ? NULL : p->B + it.d * states, states, it.width, 1);
    load_block(C_block, C_varying ? NULL : p->C + it.d * states, states, it.width, 1);
    load_row(D, offset(p->D, it.d), it.width);
    load_row(bias, offset(p->delta_bias, it.d), it.width);

    for (int64_t t = it.start; t < it.stop; t++) {
        if (p->checkpoints && (t - it.start) % STRIDE == 0) {
            REAL *kept = p->checkpoints + (it.start / STRIDE + it.sequence + (t - it.start) / STRIDE) * states * p->channels;
            for (int64_t n = 0; n < states; n++)
                store_row(kept + n * p->channels + it.d, h + n * WIDTH, it.width);
        }
        const REAL *B_row = p->B + (t * p->groups + it.group) * states;
        const REAL *C_row = p->C + (t * p->groups + it.group) * states;
        load_row(u, p->u + t * p->channels + it.d, it.width);
        step_of(step, raw, bias, p, &it, t);
        EACH inflow[w] = step[w] * u[w];
        EACH y[w] = D[w] * u[w];
        for (int64_t n = 0; n < states; n++)
            EACH {
                const REAL next = exp2_of(step[w] * A[n * WIDTH + w]) * h[n * WIDTH + w] + inflow[w] * B_AT;
                h[n * WIDTH + w] = next;
                y[w] += next * C_AT;
            }
        if (p->z) {
            load_row(z, p->z + t * p->channels + it.d, it.width);
            EACH y[w] *= z[w] * sigmoid(z[w]);
        }
        store_row(p->y + t * p->channels + it.d, y, it.width);
    }
    store_block(p->final_state + whole * states, h, states, it.width);
}

/* --- backward ------------------------------------------------------------------------------------------------- */

/* With g_t = C_t dy_t + Ā_{t+1} g_{t+1} (chapter 09), from the last chunk of STRIDE steps to the first: the states of
 * the chunk again, from its checkpoint, then the adjoint through it. */
static inline __attribute__((always_inline)) void backward_item(
    const Scan *p, Item it, REAL *restrict scratch, const int B_varying, const int C_varying)
{
    const int64_t states = p->states, block = states * WIDTH;
    REAL *restrict A = scratch, *restrict carry = A + block, *restrict dA = carry + block;
    REAL *restrict B_block = dA + block, *restrict C_block = B_block + block, *restrict dB_block = C_block + block;
    REAL *restrict dC_block = dB_block + block, *restrict decays = dC_block + block;
    REAL *restrict h = decays + STRIDE * block; /* h[0] is the checkpoint, h[i + 1] the state after step i */
    REAL u[STRIDE][WIDTH], raw[STRIDE][WIDTH], step[STRIDE][WIDTH], out[STRIDE][WIDTH];
    REAL dy[WIDTH], z[WIDTH], D[WIDTH], bias[WIDTH], dD[WIDTH] = {0}, dbias[WIDTH] = {0};
    const int64_t whole = it.sequence * p->channels + it.d;
    load_block(A, p->A + it.d * states, states, it.width, LOG2_E);
    load_block(carry, offset(p->grad_final_state, whole * states), states, it.width, 1);
    load_block(B_block, B_varying ? NULL : p->B + it.d * states, states, it.width, 1);
    load_block(C_block, C_varying ? NULL : p->C + it.d * states, states, it.width, 1);
    load_row(D, offset(p->D, it.d), it.width);
    load_row(bias, offset(p->delta_bias, it.d), it.width);
    memset(dA, 0, block * sizeof(REAL));
    memset(dB_block, 0, block * sizeof(REAL));
    memset(dC_block, 0, block * sizeof(REAL));

    for (int64_t chunk = (it.stop - it.start + STRIDE - 1) / STRIDE - 1; chunk >= 0; chunk--) {
        const int64_t first = it.start + chunk * STRIDE;
        const int steps = it.stop - first < STRIDE ? (int)(it.stop - first) : STRIDE;
        const REAL *kept = p->checkpoints + (it.start / STRIDE + it.sequence + chunk) * states * p->channels;
        for (int64_t n = 0; n < states; n++)
            load_row(h + n * WIDTH, kept + n * p->channels + it.d, it.width);
        for (int i = 0; i < steps; i++) {
            const int64_t t = first + i;
            const REAL *B_row = p->B + (t * p->groups + it.group) * states;
            const REAL *C_row = p->C + (t * p->groups + it.group) * states;
            const REAL *restrict before = h + i * block;
            REAL *restrict after = h + (i + 1) * block, *restrict decay = decays + i * block;
            load_row(u[i], p->u + t * p->channels + it.d, it.width);
            step_of(step[i], raw[i], bias, p, &it, t);
            EACH out[i][w] = D[w] * u[i][w];
            for (int64_t n = 0; n < states; n++)
                EACH {
                    const REAL a = exp2_of(step[i][w] * A[n * WIDTH + w]);
                    const REAL next = a * before[n * WIDTH + w] + step[i][w] * u[i][w] * B_AT;
                    decay[n * WIDTH + w] = a;
                    after[n * WIDTH + w] = next;
                    out[i][w] += next * C_AT;
                }
        }

        for (int i = steps - 1; i >= 0; i--) {
            const int64_t t = first + i, row = t * p->channels + it.d;
            const REAL *B_row = p->B + (t * p->groups + it.group) * states;
            const REAL *C_row = p->C + (t * p->groups + it.group) * states;
            const REAL *restrict before = h + i * block, *restrict after = h + (i + 1) * block;
            const REAL *restrict decay = decays + i * block;
            REAL du[WIDTH], ddelta[WIDTH], through_A[WIDTH] = {0}, through_B[WIDTH] = {0};
            load_row(dy, p->grad_y + row, it.width);
            if (p->z) { /* y = out silu(z) */
                REAL dz[WIDTH];
                load_row(z, p->z + row, it.width);
                EACH {
                    const REAL s = sigmoid(z[w]);
                    dz[w] = dy[w] * out[i][w] * s * (1 + z[w] * (1 - s));
                    dy[w] *= z[w] * s;
                }
                store_row(p->dz + row, dz, it.width);
            }
            REAL *dB_row = NULL, *dC_row = NULL;
            const int64_t part = ((it.block * p->rows + t) * p->groups + it.group) * states;
            if (B_varying)
                dB_row = p->dB + part;
            if (C_varying)
                dC_row = p->dC + part;
            for (int64_t n = 0; n < states; n++) {
                REAL dB_sum = 0, dC_sum = 0;
                EACH_SUM(dB_sum, dC_sum) {
                    const int64_t at = n * WIDTH + w;
                    const REAL g = carry[at] + dy[w] * C_AT;
                    const REAL back = decay[at] * g;
                    const REAL ga = back * before[at]; /* g_t Ā_t h_{t-1}: what reaches Δ A */
                    const REAL gB = g * step[i][w] * u[i][w], gC = dy[w] * after[at];
                    through_A[w] += ga * A[at];
                    through_B[w] += g * B_AT;
                    dA[at] += ga * step[i][w];
                    carry[at] = back;
                    if (B_varying)
                        dB_sum += gB;
                    else
                        dB_block[at] += gB;
                    if (C_varying)
                        dC_sum += gC;
                    else
                        dC_block[at] += gC;
                }
                if (B_varying)
                    dB_row[n] = dB_sum;
                if (C_varying)
                    dC_row[n] = dC_sum;
            }
            EACH {
                du[w] = through_B[w] * step[i][w] + D[w] * dy[w];
                ddelta[w] = through_A[w] * LN_2 + through_B[w] * u[i][w]; /* A holds log2(e) times A */
                dD[w] += dy[w] * u[i][w];
            }
            if (p->softplus)
                EACH ddelta[w] *= sigmoid(raw[i][w]);
            EACH dbias[w] += ddelta[w];
            store_row(p->du + row, du, it.width);
            store_row(p->ddelta + row, ddelta, it.width);
        }
    }

    store_block(p->dA + whole * states, dA, states, it.width);
    store_block(p->dinitial_state + whole * states, carry, states, it.width);
    if (!B_varying)
        store_block(p->dB + whole * states, dB_block, states, it.width);
    if (!C_varying)
        store_block(p->dC + whole * states, dC_block, states, it.width);
    if (p->D)
        store_row(p->dD + whole, dD, it.width);
    if (p->delta_bias)
        store_row(p->ddelta_bias + whole, dbias, it.width);
}

/* --- what Python calls, from as many threads as it likes ------------------------------------------------------- */

/* Take items until none is left. Returns 0, or -1 if there is no memory for the scratch space. */
#define DEFINE_RUN(NAME, ITEM, BLOCKS) \
    int NAME(const Scan *p, int64_t *next) \
    { \
        const size_t bytes = (size_t)(BLOCKS) * p->states * WIDTH * sizeof(REAL); \
        void *memory = malloc(bytes + 64); \
        if (!memory) \
            return -1; \
        REAL *scratch = (REAL *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); \
        const int64_t items = p->sequences * p->groups * blocks_of(p); \
        for (;;) { \
            const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); \
            if (i >= items) \
                break; \
            const Item it = item_of(p, i); \
            if (p->B_varying && p->C_varying) \
                ITEM(p, it, scratch, 1, 1); \
            else if (p->B_varying) \
                ITEM(p, it, scratch, 1, 0); \
            else if (p->C_varying) \
                ITEM(p, it, scratch, 0, 1); \
            else \
                ITEM(p, it, scratch, 0, 0); \
        } \
        free(memory); \
        return 0; \
    }

DEFINE_RUN(scan_forward, forward_item, 4)
DEFINE_RUN(scan_backward, backward_item, 7 + STRIDE + STRIDE + 1)
