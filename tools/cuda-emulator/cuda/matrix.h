// Products of matrices over the lanes of a warp.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_emulator {

// The element of type `Half` in one half of a register.
template <class Half>
float element(uint32_t word, uint32_t upper) {
    return Half::from_bits(upper != 0 ? word >> 16 : word & 0xFFFF);
}

// What a lane gives to m16n8k16: four registers of A (16x16), two of B (16x8), and four numbers of C (16x8).
struct ProductInput {
    uint32_t a[4];
    uint32_t b[2];
    float c[4];
};

// D = A B + C, its terms added in the order of k. Lane 4 g + t has of A the rows g and g + 8 and the columns 2 t, 2 t + 1, and eight
// further; of B the rows 2 t, 2 t + 1, and eight further, of column g; of C and D the rows g and g + 8, columns 2 t and 2 t + 1.
template <class Half>
void multiply(Warp&, unsigned char (*given)[LANE_BYTES], unsigned char (*taken)[LANE_BYTES]) {
    float a[16][16], b[16][8], d[16][8];
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        ProductInput input;
        memcpy(&input, given[lane], sizeof(input));
        const uint32_t g = lane / 4, t = lane % 4 * 2;
        for (uint32_t i = 0; i < 2; ++i) {
            a[g][t + i] = element<Half>(input.a[0], i);
            a[g + 8][t + i] = element<Half>(input.a[1], i);
            a[g][t + 8 + i] = element<Half>(input.a[2], i);
            a[g + 8][t + 8 + i] = element<Half>(input.a[3], i);
            b[t + i][g] = element<Half>(input.b[0], i);
            b[t + 8 + i][g] = element<Half>(input.b[1], i);
            d[g][t + i] = input.c[i];
            d[g + 8][t + i] = input.c[2 + i];
        }
    }
    for (uint32_t row = 0; row < 16; ++row) {
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        const uint32_t g = lane / 4, t = lane % 4 * 2;
        const float own[4] = {d[g][t], d[g][t + 1], d[g + 8][t], d[g + 8][t + 1]};
        memcpy(taken[lane], own, sizeof(own));
    }
}

// The address of `bytes` bytes of shared memory, which begin at a multiple of `bytes`.
inline char* shared_address(const char* operation, uint32_t address, uint32_t bytes, uint32_t line) {
    Block& own = block();
    if (address % bytes != 0 || address + bytes > own.shared_bytes) {
        cuda_emulator_fail("%s (line %u) with the shared address %u: it must be a multiple of %u below %u", operation, line,
                           address, bytes, own.shared_bytes);
    }
    return own.shared + address;
}

// The rows whose addresses the lanes 8 i to 8 i + 7 give are matrix i. Lane 4 g + t takes of each the elements 2 t and 2 t + 1
// of row g, or of column g.
template <bool transposed, int count>
void load_matrices(uint32_t (&registers)[count], uint32_t address, uint32_t line) {
    Fiber& own = fiber();
    Warp& warp = *own.warp;
    const char* const row =
        own.lane < 8 * count ? shared_address("ldmatrix", address, 16, line) : nullptr;
    uint16_t elements[8] = {};
    if (row != nullptr) memcpy(elements, row, sizeof(elements));
    const uint32_t turn = cuda_emulator_warp_operation("ldmatrix", line, elements, sizeof(elements), nullptr);
    const uint32_t g = own.lane / 4, t = own.lane % 4 * 2;
    for (uint32_t i = 0; i < count; ++i) {
        uint16_t pair[2];
        for (uint32_t j = 0; j < 2; ++j) {
            const uint32_t from = transposed ? t + j : g, column = transposed ? g : t + j;
            memcpy(&pair[j], warp.given[turn][8 * i + from] + 2 * column, 2);
        }
        registers[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

// The reverse of `load_matrices`.
template <bool transposed, int count>
void store_matrices(const uint32_t (&registers)[count], uint32_t address, uint32_t line) {
    Fiber& own = fiber();
    Warp& warp = *own.warp;
    const uint32_t turn = cuda_emulator_warp_operation("stmatrix", line, registers, sizeof(registers), nullptr);
    if (own.lane < 8 * count) {
        char* const row = shared_address("stmatrix", address, 16, line);
        const uint32_t matrix = own.lane / 8, from = own.lane % 8;
        for (uint32_t column = 0; column < 8; ++column) {
            const uint32_t g = transposed ? column : from, other = transposed ? from : column;
            memcpy(row + 2 * column, warp.given[turn][4 * g + other / 2] + 4 * matrix + other % 2 * 2, 2);
        }
    }
    // No lane goes on before all rows are stored.
    cuda_emulator_warp_operation("stmatrix", line, nullptr, 0, nullptr);
}

}  // namespace cuda_emulator
