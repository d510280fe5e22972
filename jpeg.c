// SPDX-License-Identifier: BSD-3-Clause
// The pixels of one box of a baseline JPEG; jpeg.py compiles this and calls decode_box, at the end.
//
// A training crop is a part of a picture, often a small one. A general decoder makes whole rows, from the first on; here
// the blocks outside the box are only counted through. What is left of the time is Huffman decoding, and so that takes two
// codes at a look. A picture of 1/2, 1/4 or 1/8 size is the mean of the large one's pixels, as in libjpeg-turbo.
//
// A file that this cannot read, or that is damaged where it is read, is refused, and another decoder has its say. No read
// or write depends on the file being well formed. Sections and figures are those of ITU-T T.81, the JPEG standard.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bits are read for a little-endian machine"
#endif

#define LOOK 11  // bits that a table is indexed by: with 12 the tables of a picture outgrow the first cache
#define INLINE static inline __attribute__((always_inline))

typedef float v8 __attribute__((vector_size(32)));

enum { DONE, DAMAGED, UNSUPPORTED };

// --- bits -------------------------------------------------------------------------------------------------------------

typedef struct {
    const uint8_t *next, *end;
    uint64_t bits;     // those to come, the next one uppermost
    unsigned count;    // how many of them are good
    unsigned made_up;  // zero bytes given where the file has no more
} Reader;

// From at most 63 bits to at least 56: two coefficients of 26, or two looks and one. After a byte of 255 comes a 0, or the
// data end in a marker (B.1.1.5). Bits below the good ones are 0, or already what will come there.
INLINE void refill(Reader *r)
{
    if (r->end - r->next >= 8) {
        const uint64_t ones = 0x0101010101010101;
        uint64_t word;
        memcpy(&word, r->next, 8);
        word = __builtin_bswap64(word);
        if (!((~word - ones) & word & ones << 7)) {  // no byte is 255
            r->bits |= word >> r->count;
            r->next += (63 - r->count) >> 3;
            r->count |= 56;
            return;
        }
    }
    while (r->count <= 56) {
        uint64_t byte = 0;
        if (r->next < r->end && (*r->next != 255 || (r->end - r->next > 1 && r->next[1] == 0))) {
            byte = *r->next;
            r->next += byte == 255 ? 2 : 1;
        } else {
            r->made_up++;
        }
        r->bits |= byte << (56 - r->count);
        r->count += 8;
    }
}

INLINE void pass(Reader *r, unsigned bits)
{
    r->bits <<= bits;
    r->count -= bits;
}

// --- Huffman codes ----------------------------------------------------------------------------------------------------

// A code and the number behind it, in 16 bits: bits of both | bits of the number << 5 | zeros before it << 9.
enum { END_OF_BLOCK = 127 };  // as many zeros as no run in a block can reach
#define BITS(code) ((code) & 31)
#define SIZE(code) ((code) >> 5 & 15)
#define RUN(code) ((code) >> 9)

typedef struct {       // of AC coefficients, as many as end within LOOK bits, up to two
    int16_t first, second;
    uint8_t run;       // zeros before the first
    uint8_t step;      // from the first to the second; 0: there is none
    uint8_t bits;      // of all; 0: not even the first ends here
    uint8_t unused;    // 8 bytes are read at once
} Two;

typedef struct {
    uint8_t definition[16 + 256];  // as in the file: the number of codes of each length, and their values
    uint16_t one[1 << LOOK];       // by the next bits: the code; 0: a longer one
    Two two[1 << LOOK];            // by the next bits
    int limit[17], shift[17];      // by length: the first number above its codes, and from a code to its value's place
} Huffman;

// The place in a block of the k-th coefficient of a file (figure A.6); 64, a spare one, for those beyond it.
static const uint8_t natural[224] = {
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55,
    62, 63, [64 ... 223] = 64};

static unsigned code_of(unsigned length, unsigned value, int ac)
{
    unsigned run = !ac ? 0 : value ? value >> 4 : END_OF_BLOCK;
    return (length + (value & 15)) | (value & 15) << 5 | run << 9;
}

// F.2.2.1: the number behind a code; a leading 0 stands for a negative one.
INLINE int number(const Reader *r, unsigned code)
{
    uint64_t rest = r->bits << (BITS(code) - SIZE(code));
    return (int)(rest >> 1 >> (63 - SIZE(code))) - (((1 << SIZE(code)) - 1) & ((int)(rest >> 63) - 1));
}

// C.2. definition: `count` values. Returns whether it makes sense.
static int make_table(Huffman *table, const uint8_t *definition, int count, int ac)
{
    if (count && !memcmp(table->definition, definition, 16 + count))
        return 1;  // most files have the same ones
    int code = 0, place = 0;
    memset(table, 0, sizeof *table);
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->shift[length] = place - code;
        for (int i = 0; i < definition[length - 1]; i++, code++, place++) {
            unsigned value = definition[16 + place];
            if (code >= 1 << length || (ac ? (value & 15) > 10 : value > 11))
                return 0;
            if (ac && value && value != 0xf0 && !(value & 15))  // no such run (F.1.2.2)
                return 0;
            for (int k = 0; length <= LOOK && k < 1 << (LOOK - length); k++)
                table->one[(code << (LOOK - length)) + k] = code_of(length, value, ac);
        }
        table->limit[length] = code;
    }
    for (unsigned index = 0; ac && index < 1 << LOOK; index++) {
        Reader r = {.bits = (uint64_t)index << (64 - LOOK)};
        Two *two = table->two + index;
        unsigned code = table->one[index];
        if (!code || BITS(code) > LOOK)
            continue;
        two->first = two->second = number(&r, code), two->run = RUN(code), two->bits = BITS(code);
        pass(&r, BITS(code));
        unsigned next = table->one[r.bits >> (64 - LOOK)];
        if (RUN(code) != END_OF_BLOCK && next && BITS(code) + BITS(next) <= LOOK)
            two->second = number(&r, next), two->step = RUN(next) + 1, two->bits += BITS(next);
    }
    memcpy(table->definition, definition, 16 + count);  // last: a table that makes no sense is never taken for known
    return 1;
}

static __attribute__((noinline)) unsigned long_code(uint64_t bits, const Huffman *table, int ac)
{
    for (int length = LOOK + 1; length <= 16; length++) {
        int code = bits >> (64 - length);
        if (code < table->limit[length])
            return code_of(length, table->definition[16 + ((code + table->shift[length]) & 255)], ac);
    }
    return 0;
}

// The next code; 0: there is no such code.
INLINE unsigned look(const Reader *r, const Huffman *table, int ac)
{
    unsigned code = table->one[r->bits >> (64 - LOOK)];
    return __builtin_expect(!code, 0) ? long_code(r->bits, table, ac) : code;
}

// --- blocks -----------------------------------------------------------------------------------------------------------

typedef struct {
    int across, down;            // sampling factors
    int id, quantum;             // numbers that the file gives it and its quantisation table
    const Huffman *dc, *ac;
    v8 scale[8];                 // what coefficients are multiplied by, [row][column]
    int edge, edge_of_basis;     // pixels that a block becomes, across and down; and those that the next two are for
    float basis[8][8];           // [pixel][frequency]
    v8 transposed[8];            // [frequency][pixel]
    unsigned prediction;         // of the next DC coefficient; unsigned: it may wrap in a damaged file
    int width, height;           // of the plane
    uint8_t *plane;              // the box's blocks
} Component;

// F.2.2: a block's coefficients to their places in `block`, or nowhere where that is NULL. Returns whether the codes fit.
INLINE int read_block(Reader *r, Component *c, int16_t *block)
{
    refill(r);
    unsigned code = look(r, c->dc, 0);
    if (!code)
        return 0;
    c->prediction += number(r, code);
    pass(r, BITS(code));
    if (block) {
        memset(block, 0, 64 * sizeof *block);
        block[0] = (int16_t)c->prediction;
    }
    for (unsigned k = 1; k < 64;) {
        refill(r);
        for (int i = 0; i < (block ? 2 : 3); i++) {
            const Two two = c->ac->two[r->bits >> (64 - LOOK)];
            if (__builtin_expect(!two.bits, 0)) {
                code = look(r, c->ac, 1);
                if (!code)
                    return 0;
                k += RUN(code);
                if (k > 63 && RUN(code) != END_OF_BLOCK)
                    return 0;
                if (block)
                    block[natural[k]] = number(r, code);
                pass(r, BITS(code));
                k++;
                break;
            }
            unsigned first = k + two.run;
            k = first + two.step;
            if (block) {
                block[natural[first]] = two.first;
                block[natural[k]] = two.second;
            }
            if (++k > 63) {
                if (first == 63) {  // full to its end, and so without a mark there: the second code is the next block's
                    pass(r, BITS(c->ac->one[r->bits >> (64 - LOOK)]));
                    return 1;
                }
                pass(r, two.bits);
                return first > 63 ? first > END_OF_BLOCK : k == 64 || k > END_OF_BLOCK;  // no run beyond the block
            }
            pass(r, two.bits);
        }
    }
    return 1;
}

// A.3.3 as two products of matrices, of `edge` rows and columns, and 128 more.
INLINE void inverse_dct_to(int edge, const int16_t *block, const Component *c, uint8_t *pixels)
{
    v8 in[8], rows[8], out[8];
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++)
        ((float *)in)[i] = (float)block[i] * ((const float *)c->scale)[i];
    for (int y = 0; y < (edge + 1) / 2; y++) {  // the last rows are the first ones with the odd frequencies negative
        v8 even = c->basis[y][0] * in[0], odd = c->basis[y][1] * in[1];
        for (int k = 2; k < 8; k += 2)
            even += c->basis[y][k] * in[k], odd += c->basis[y][k + 1] * in[k + 1];
        rows[y] = even + odd, rows[edge - 1 - y] = even - odd;  // where edge is 1, the odd basis is 0
    }
    for (int y = 0; y < edge; y++) {
        const float *row = (const float *)(rows + y);
        v8 even = row[0] * c->transposed[0], odd = row[1] * c->transposed[1];
        for (int k = 2; k < 8; k += 2)
            even += row[k] * c->transposed[k], odd += row[k + 1] * c->transposed[k + 1];
        out[y] = even + odd;
    }
    for (int i = 0; i < 8 * edge; i++) {
        float value = ((const float *)out)[i] + 128.5f;
        value = value > 0 ? value : 0;
        bytes[i] = (int)(value < 255 ? value : 255);
    }
    for (int y = 0; y < edge; y++, pixels += c->width)
        memcpy(pixels, bytes + 8 * y, edge);
}

static __attribute__((noinline)) void inverse_dct(const int16_t *block, const Component *c, uint8_t *pixels)
{
    switch (c->edge) {  // for each its own code, without loops
    case 8: inverse_dct_to(8, block, c, pixels); break;
    case 4: inverse_dct_to(4, block, c, pixels); break;
    case 2: inverse_dct_to(2, block, c, pixels); break;
    default: inverse_dct_to(1, block, c, pixels);
    }
}

static void make_basis(Component *c)
{
    int mean = 8 / c->edge;
    memset(c->transposed, 0, sizeof c->transposed);
    for (int pixel = 0; pixel < c->edge; pixel++)
        for (int k = 0; k < 8; k++) {
            double sum = 0;
            for (int i = 0; i < mean; i++)
                sum += cos((2 * (pixel * mean + i) + 1) * k * M_PI / 16);
            c->basis[pixel][k] = c->transposed[k][pixel] = sum / mean * (k ? 0.5 : M_SQRT1_2 / 2);
        }
    c->edge_of_basis = c->edge;
}

// --- a file -----------------------------------------------------------------------------------------------------------

typedef struct {
    int width, height, parts;     // parts: 1, grey, or 3, YCbCr
    int interval, until_restart;  // units between restart markers, or 0; those left before the next one
    int restarts;                 // the next marker's number
    uint8_t quanta[4][64];
    Huffman tables[2][4];         // DC and AC
    uint8_t has_quanta[4], has_table[2][4];
    Component component[3];
    Reader reader;
} Picture;

static int word(const uint8_t *at)
{
    return at[0] << 8 | at[1];
}

// B.2.2
static int read_frame(Picture *p, const uint8_t *segment, int length)
{
    if (p->parts || length < 6 || segment[0] != 8)
        return UNSUPPORTED;
    p->height = word(segment + 1), p->width = word(segment + 3), p->parts = segment[5];
    if ((p->parts != 1 && p->parts != 3) || length != 6 + 3 * p->parts)
        return UNSUPPORTED;
    for (int i = 0; i < p->parts; i++) {
        Component *c = p->component + i;
        c->id = segment[6 + 3 * i], c->quantum = segment[8 + 3 * i];
        c->across = segment[7 + 3 * i] >> 4, c->down = segment[7 + 3 * i] & 15;
        if (p->parts == 1)  // its blocks follow each other one by one, whatever the factors (A.2.2)
            c->across = c->down = 1;
        int most = i ? 1 : 2;
        if (c->across < 1 || c->across > most || c->down < 1 || c->down > most || c->quantum > 3)
            return UNSUPPORTED;
    }
    if (p->parts == 3 && segment[6] == 'R' && segment[9] == 'G' && segment[12] == 'B')  // as libjpeg understands it
        return UNSUPPORTED;
    return DONE;
}

// B.2.3
static int read_scan(Picture *p, const uint8_t *segment, int length)
{
    if (!p->parts || length != 4 + 2 * p->parts || segment[0] != p->parts)
        return UNSUPPORTED;
    for (int i = 0; i < p->parts; i++) {
        Component *c = p->component + i;
        int dc = segment[2 + 2 * i] >> 4, ac = segment[2 + 2 * i] & 15;
        if (segment[1 + 2 * i] != c->id || dc > 3 || ac > 3 || !p->has_table[0][dc] || !p->has_table[1][ac]
            || !p->has_quanta[c->quantum])
            return DAMAGED;
        c->dc = &p->tables[0][dc], c->ac = &p->tables[1][ac], c->prediction = 0;
        for (int k = 0; k < 64; k++)
            ((float *)c->scale)[natural[k]] = p->quanta[c->quantum][k];
    }
    return DONE;
}

// B.2.1: up to the first coded byte.
static int read_headers(Picture *p, const uint8_t *at, const uint8_t *end)
{
    p->parts = p->interval = p->restarts = 0;
    memset(p->has_quanta, 0, sizeof p->has_quanta), memset(p->has_table, 0, sizeof p->has_table);
    if (end - at < 4 || word(at) != 0xffd8 || word(end - 2) != 0xffd9)  // an incomplete file is damaged
        return DAMAGED;
    at += 2;
    while (end - at >= 4 && at[0] == 0xff) {
        int marker = at[1], length = word(at + 2) - 2, answer = DONE;
        const uint8_t *segment = at + 4;
        if (length < 0 || length > end - segment)
            return DAMAGED;
        at = segment + length;
        if (marker < 0xc0 || marker == 0xff || (marker >= 0xd0 && marker <= 0xd9))  // without a length, or none
            return UNSUPPORTED;
        if (marker == 0xdb)
            for (; segment < at; segment += 65) {  // B.2.4.1
                if (segment[0] > 3 || at - segment < 65)
                    return UNSUPPORTED;
                memcpy(p->quanta[segment[0]], segment + 1, 64);
                p->has_quanta[segment[0]] = 1;
            }
        else if (marker == 0xc4)
            while (segment < at) {  // B.2.4.2
                int ac = segment[0] >> 4, number = segment[0] & 15, count = 0;
                for (int i = 1; i <= 16 && at - segment >= 17; i++)
                    count += segment[i];
                if (ac > 1 || number > 3 || count > 256 || at - segment < 17 + count
                    || !make_table(&p->tables[ac][number], segment + 1, count, ac))
                    return DAMAGED;
                p->has_table[ac][number] = 1;
                segment += 17 + count;
            }
        else if (marker == 0xdd) {  // B.2.4.4
            if (length != 2)
                return DAMAGED;
            p->interval = p->until_restart = word(segment);
        } else if (marker == 0xee)  // Adobe's, whose last byte is 1 for YCbCr
            answer = length >= 12 && !memcmp(segment, "Adobe", 5) && segment[11] != 1 ? UNSUPPORTED : DONE;
        else if (marker == 0xc0)
            answer = read_frame(p, segment, length);
        else if (marker > 0xc0 && marker <= 0xcf)  // progressive, lossless, arithmetic coding
            answer = UNSUPPORTED;
        else if (marker == 0xda) {
            p->reader = (Reader){.next = at, .end = end};
            return read_scan(p, segment, length);
        }
        if (answer != DONE)
            return answer;
    }
    return DAMAGED;
}

// F.2.1.3.1: behind the marker nothing depends on what was before. Returns whether the right one comes next.
static int restart(Picture *p)
{
    Reader *r = &p->reader;
    refill(r);
    while (r->end - r->next >= 2 && r->next[0] == 255 && r->next[1] == 255)  // B.1.1.2
        r->next++;
    if (r->count >= 8 * r->made_up + 8 || r->end - r->next < 2 || r->next[0] != 255 || r->next[1] != 0xd0 + p->restarts)
        return 0;
    p->restarts = (p->restarts + 1) % 8;
    *r = (Reader){.next = r->next + 2, .end = r->end};
    for (int i = 0; i < p->parts; i++)
        p->component[i].prediction = 0;
    p->until_restart = p->interval;
    return 1;
}

// `count` units (A.2.3), decoded into the planes from their unit (0, y) on, or skipped.
INLINE int read_units(Picture *p, int count, int decoded, int y)
{
    Reader r = p->reader;
    // All blocks of a unit are read before the first becomes pixels: its stores are then done, and no load waits for them.
    int16_t blocks[6][64 + 16] __attribute__((aligned(32)));
    for (int x = 0; x < count; x++) {
        if (p->interval) {
            if (!p->until_restart) {
                p->reader = r;
                if (!restart(p))
                    return DAMAGED;
                r = p->reader;
            }
            p->until_restart--;
        }
        int16_t (*block)[64 + 16] = blocks;
        for (int i = 0; i < p->parts; i++)
            for (int k = p->component[i].across * p->component[i].down; k; k--)
                if (!read_block(&r, p->component + i, decoded ? *block++ : NULL))
                    return DAMAGED;
        block = blocks;
        for (int i = 0; decoded && i < p->parts; i++) {
            Component *c = p->component + i;
            for (int v = 0; v < c->down; v++)
                for (int h = 0; h < c->across; h++)
                    inverse_dct(*block++, c, c->plane + (size_t)(y * c->down + v) * c->edge * c->width
                                                 + (x * c->across + h) * c->edge);
        }
        if (r.made_up * 8 > r.count)  // the data ended within this unit
            return DAMAGED;
    }
    p->reader = r;
    return DONE;
}

static __attribute__((noinline)) int decode_units(Picture *p, int count, int y) { return read_units(p, count, 1, y); }
static __attribute__((noinline)) int skip_units(Picture *p, int count) { return read_units(p, count, 0, 0); }

// --- pixels -----------------------------------------------------------------------------------------------------------

INLINE int clamp(int value, int least, int most)
{
    return value < least ? least : value > most ? most : value;
}

// A row of colour at the picture's resolution, from pixel `left` rounded down to an even one: three quarters of the nearest
// sample and a quarter of the next one, across and down, rounded as libjpeg's "fancy upsampling" does. x0, y0: the sample
// that the plane begins with. last_x, last_y: the picture's last one. mixed: room for a row.
static void upsample(const Component *c, int across, int down, int x0, int y0, int last_x, int last_y, int left, int right,
                     int y, int16_t *mixed, int16_t *row)
{
    int nearest = y / down, next = down == 1 ? nearest : clamp(y & 1 ? nearest + 1 : nearest - 1, 0, last_y);
    const uint8_t *near = c->plane + (size_t)(nearest - y0) * c->width;
    const uint8_t *far = c->plane + (size_t)(next - y0) * c->width;
    if (across == 1) {
        int half = down == 1 || y & 1 ? 2 : 1;
        for (int x = left & ~1; x < right; x++)
            row[x - (left & ~1)] = (3 * near[x - x0] + far[x - x0] + half) >> 2;
        return;
    }
    int from = left / 2 - 1, to = (right - 1) / 2 + 1, scale = down == 2 ? 3 : 1;
    for (int x = clamp(from, 0, last_x); x <= clamp(to, 0, last_x); x++)
        mixed[x - from] = scale * near[x - x0] + (down == 2 ? far[x - x0] : 0);
    if (from < 0)
        mixed[0] = mixed[1];
    if (to > last_x)
        mixed[to - from] = mixed[to - from - 1];
    int even = down == 2 ? 8 : 1, odd = down == 2 ? 7 : 2, shift = down == 2 ? 4 : 2;
    for (int i = 0; i < to - from - 1; i++) {
        row[2 * i] = (3 * mixed[i + 1] + mixed[i] + even) >> shift;
        row[2 * i + 1] = (3 * mixed[i + 1] + mixed[i + 2] + odd) >> shift;
    }
}

// The pixels [left, right) × [top, bottom) of the picture at 1/shrink of its size, rounded up; shrink is 1, 2, 4 or 8.
// rgb: room for (bottom - top, right - left, 3). Returns DONE, DAMAGED or UNSUPPORTED.
int decode_box(const uint8_t *data, size_t size, int shrink, int left, int top, int right, int bottom, uint8_t *rgb)
{
    static __thread Picture kept;   // its tables and bases may serve the next file
    static __thread uint8_t *room;
    static __thread size_t room_size;
    Picture *p = &kept;

    int answer = read_headers(p, data, data + size);
    if (answer != DONE)
        return answer;
    int width = (p->width + shrink - 1) / shrink, height = (p->height + shrink - 1) / shrink;
    if (left < 0 || top < 0 || left >= right || top >= bottom || right > width || bottom > height)
        return UNSUPPORTED;

    // The units that hold the box, and the samples next to it.
    Component *luma = p->component, *blue = luma + 1, *red = luma + 2;
    int edge = 8 / shrink, unit_width = edge * luma->across, unit_height = edge * luma->down;
    int units_across = (width - 1) / unit_width + 1, units_down = (height - 1) / unit_height + 1;
    int first_x = clamp(left - 2, 0, width) / unit_width, first_y = clamp(top - 2, 0, height) / unit_height;
    int last_x = clamp((right + 1) / unit_width + 1, 1, units_across);
    int last_y = clamp((bottom + 1) / unit_height + 1, 1, units_down);

    int ratio_across = luma->across, ratio_down = luma->down, box_width = right - left;
    size_t needed = 0, row_size = (box_width + 8) * sizeof(int16_t);
    for (int i = 0; i < p->parts; i++) {
        Component *c = p->component + i;
        c->edge = edge;
        if (i && edge < 8 && luma->across == 2 && luma->down == 2)  // no need to shrink what has half the resolution
            c->edge = 2 * edge, ratio_across = ratio_down = 1;
        if (c->edge_of_basis != c->edge)
            make_basis(c);
        c->width = (last_x - first_x) * c->across * c->edge, c->height = (last_y - first_y) * c->down * c->edge;
        needed += (size_t)c->width * c->height;
    }
    needed += 3 * row_size;
    if (needed > room_size) {
        free(room);
        room = malloc(needed);
        room_size = room ? needed : 0;
        if (!room)
            return UNSUPPORTED;
    }
    int16_t *cb = (int16_t *)room, *cr = cb + row_size / 2, *mixed = cr + row_size / 2;
    uint8_t *plane = room + 3 * row_size;
    for (int i = 0; i < p->parts; i++) {
        p->component[i].plane = plane;
        plane += (size_t)p->component[i].width * p->component[i].height;
    }

    int skipped = first_y * units_across + first_x;
    for (int y = first_y; y < last_y; y++) {
        if (skip_units(p, skipped) != DONE || decode_units(p, last_x - first_x, y - first_y) != DONE)
            return DAMAGED;
        skipped = units_across - (last_x - first_x);
    }

    int x0 = first_x * blue->edge, y0 = first_y * blue->edge, odd = left & 1;
    int last_column = (width - 1) / ratio_across, last_row = (height - 1) / ratio_down;
    for (int y = top; y < bottom; y++, rgb += 3 * box_width) {
        const uint8_t *grey = luma->plane + (size_t)(y - first_y * unit_height) * luma->width + left
                              - first_x * unit_width;
        if (p->parts == 1) {
            for (int x = 0; x < box_width; x++)
                rgb[3 * x] = rgb[3 * x + 1] = rgb[3 * x + 2] = grey[x];
            continue;
        }
        upsample(blue, ratio_across, ratio_down, x0, y0, last_column, last_row, left, right, y, mixed, cb);
        upsample(red, ratio_across, ratio_down, x0, y0, last_column, last_row, left, right, y, mixed, cr);
        for (int x = 0; x < box_width; x++) {  // JFIF 1.02, with 16 bits behind the point
            int b = cb[x + odd] - 128, r = cr[x + odd] - 128;
            rgb[3 * x] = clamp(grey[x] + ((91881 * r + 32768) >> 16), 0, 255);
            rgb[3 * x + 1] = clamp(grey[x] + ((-22554 * b - 46802 * r + 32768) >> 16), 0, 255);
            rgb[3 * x + 2] = clamp(grey[x] + ((116130 * b + 32768) >> 16), 0, 255);
        }
    }
    return DONE;
}
