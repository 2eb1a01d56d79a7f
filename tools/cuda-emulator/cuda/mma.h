// wmma: matrices spread over the lanes of a warp. Element i of lane l is element 32 i + l of the matrix, row by row; CUDA does not
// say how it is, and no source may ask.
#pragma once

#include "matrix.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace detail {

using namespace ::cuda_emulator;

template <class Use, int m, int n, int k>
struct Shape;
template <int m, int n, int k>
struct Shape<matrix_a, m, n, k> {
    static constexpr int rows = m, columns = k;
};
template <int m, int n, int k>
struct Shape<matrix_b, m, n, k> {
    static constexpr int rows = k, columns = n;
};
template <int m, int n, int k>
struct Shape<accumulator, m, n, k> {
    static constexpr int rows = m, columns = n;
};

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
    using Shape = detail::Shape<Use, m, n, k>;
    static constexpr int num_elements = Shape::rows * Shape::columns / 32;
    T x[num_elements];
};

namespace detail {

// Where the element i of the running lane lies, in memory with so many elements from one row, or column, to the next.
template <class Shape>
size_t offset(int i, uint32_t stride, bool column_major) {
    const uint32_t element = 32 * i + fiber().lane;
    const uint32_t row = element / Shape::columns, column = element % Shape::columns;
    return column_major ? static_cast<size_t>(column) * stride + row : static_cast<size_t>(row) * stride + column;
}

inline void meet(const char* operation, uint32_t line) {
    if (fiber().warp->lanes != WARP) cuda_emulator_fail("%s (line %u) in a warp of %u lanes", operation, line, fiber().warp->lanes);
    cuda_emulator_warp_operation(operation, line, nullptr, 0, nullptr);
}

template <class Fragment, class T>
void load(Fragment& fragment, const T* source, uint32_t stride, bool column_major, uint32_t line) {
    meet("load_matrix_sync", line);
    for (int i = 0; i < Fragment::num_elements; ++i) {
        fragment.x[i] = source[offset<typename Fragment::Shape>(i, stride, column_major)];
    }
    meet("load_matrix_sync", line);
}

template <class A, class B, class C>
struct Input {
    A a;
    B b;
    C c;
};

// D = A B + C, its terms added in the order of k.
template <class A, class B, class C>
void multiply(Warp&, unsigned char (*given)[LANE_BYTES], unsigned char (*taken)[LANE_BYTES]) {
    constexpr int m = A::Shape::rows, n = B::Shape::columns, k = A::Shape::columns;
    float a[m * k], b[k * n], d[m * n];
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        Input<A, B, C> input;
        memcpy(&input, given[lane], sizeof(input));
        for (int i = 0; i < A::num_elements; ++i) a[32 * i + lane] = input.a.x[i];
        for (int i = 0; i < B::num_elements; ++i) b[32 * i + lane] = input.b.x[i];
        for (int i = 0; i < C::num_elements; ++i) d[32 * i + lane] = input.c.x[i];
    }
    for (int row = 0; row < m; ++row) {
        for (int inner = 0; inner < k; ++inner) {
            for (int column = 0; column < n; ++column) d[row * n + column] += a[row * k + inner] * b[inner * n + column];
        }
    }
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        C own;
        for (int i = 0; i < C::num_elements; ++i) own.x[i] = d[32 * i + lane];
        memcpy(taken[lane], &own, sizeof(own));
    }
}

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout, class Value>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& fragment, Value value) {
    for (T& x : fragment.x) x = value;
}

template <class Use, int m, int n, int k, class T, class Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& fragment, const T* source, uint32_t stride,
                      uint32_t line = __builtin_LINE()) {
    detail::load(fragment, source, stride, std::is_same_v<Layout, col_major>, line);
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& fragment, const T* source, uint32_t stride, layout_t layout,
                      uint32_t line = __builtin_LINE()) {
    detail::load(fragment, source, stride, layout == mem_col_major, line);
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* destination, const fragment<accumulator, m, n, k, T>& fragment, uint32_t stride, layout_t layout,
                       uint32_t line = __builtin_LINE()) {
    using Fragment = wmma::fragment<accumulator, m, n, k, T>;
    detail::meet("store_matrix_sync", line);
    for (int i = 0; i < Fragment::num_elements; ++i) {
        destination[detail::offset<typename Fragment::Shape>(i, stride, layout == mem_col_major)] = fragment.x[i];
    }
    detail::meet("store_matrix_sync", line);
}

template <int m, int n, int k, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& d, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, float>& c,
              uint32_t line = __builtin_LINE()) {
    using namespace detail;
    using A = fragment<matrix_a, m, n, k, T, LayoutA>;
    using B = fragment<matrix_b, m, n, k, T, LayoutB>;
    using C = fragment<accumulator, m, n, k, float>;
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
    static_assert(sizeof(Input<A, B, C>) <= LANE_BYTES);
    Fiber& own = fiber();
    if (own.warp->lanes != WARP) cuda_emulator_fail("mma_sync (line %u) in a warp of %u lanes", line, own.warp->lanes);
    const Input<A, B, C> input{a, b, c};
    const uint32_t turn = cuda_emulator_warp_operation("mma_sync", line, &input, sizeof(input), multiply<A, B, C>);
    memcpy(&d, own.warp->taken[turn][own.lane], sizeof(d));
}

}  // namespace nvcuda::wmma
