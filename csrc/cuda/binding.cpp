// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as a Python module. It takes addresses and sizes and knows nothing of torch or of CUDA. The caller,
// sspo_ext/backends/cuda.py, checks shapes, dtypes, strides and devices. sspo_ext/_C_cuda.pyi has the signatures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

#ifndef SSPO_CUDA_ARCHITECTURES
#define SSPO_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;
using namespace sspo::cuda;

namespace {

using Address = uintptr_t;  // tensor.data_ptr(), or 0 for None
using Sizes = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 2>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Positions, rows and columns are 32-bit in the kernels; offsets are 64-bit.
template <class Int>
Int narrow(const char* name, int64_t value, int64_t most = std::numeric_limits<int32_t>::max() - 64 * 1024) {
    if (value < 0 || value > most)
        throw py::value_error(std::string(name) + ": expected 0.." + std::to_string(most) + ", got " +
                              std::to_string(value));
    return static_cast<Int>(value);
}

DType to_dtype(int code) {
    if (code < 0 || code > 2) throw py::value_error("dtype code must be 0..2");
    return static_cast<DType>(code);
}

LogitMap to_map(double a, double c) {
    const double factor = c == 0 ? a : c;
    return {c != 0, static_cast<float>(a), static_cast<float>(factor * 1.44269504088896340736), factor};
}

template <class Params>
void set_sizes(Params& p, const Sizes& sizes, int64_t N) {
    p.positions = narrow<uint32_t>("B * T", sizes[0] * sizes[1]);
    p.T = narrow<uint32_t>("T", sizes[1] > 0 ? sizes[1] : 1);
    p.V = narrow<int32_t>("V", sizes[2]);
    p.N = narrow<int32_t>("N", N);
}

void check(int error, const char* name) {
    if (error) throw std::runtime_error(std::string(name) + ": " + error_string(error));
}

void fwd(Address logits, int dtype, Sizes sizes, Strides strides, Address rows, Address labels, int64_t N, double a,
         double c, Address logp, Address lse, int splits, Address partials, Address arrived, int device,
         Address stream) {
    FwdParams p = {};
    set_sizes(p, sizes, N);
    p.logits = {at<void>(logits), strides[0], strides[1]};
    p.map = to_map(a, c);
    p.rows = at<int64_t>(rows);
    p.labels = at<int64_t>(labels);
    p.logp = at<float>(logp);
    p.lse = at<double>(lse);
    p.splits = narrow<int32_t>("splits", splits, kMaxSplits);
    p.partials = at<Partial>(partials);
    p.arrived = at<uint32_t>(arrived);
    check(token_logp_fwd(p, to_dtype(dtype), device, at<void>(stream)), "token_logp_fwd");
}

void bwd(Address logits, int dtype, Sizes sizes, Strides strides, Address row_of, Address labels, Address lse,
         Address coef, Address upstream, int64_t N, double a, double c, Address out, Strides out_strides, int device,
         Address stream) {
    BwdParams p = {};
    set_sizes(p, sizes, N);
    p.logits = {at<void>(logits), strides[0], strides[1]};
    p.out = {at<void>(out), out_strides[0], out_strides[1]};
    p.map = to_map(a, c);
    p.row_of = at<int32_t>(row_of);
    p.labels = at<int64_t>(labels);
    p.lse = at<double>(lse);
    p.coef = at<float>(coef);
    p.upstream = at<float>(upstream);
    p.splits = row_splits(p.positions, p.V, to_dtype(dtype));
    check(token_logp_bwd(p, to_dtype(dtype), device, at<void>(stream)), "token_logp_bwd");
}

void steps(Sizes sizes, std::array<Address, 11> in, int formula, std::vector<double> options, double label,
           std::array<Address, 4> out, Address arrived, int device, Address stream) {
    if (formula < 0 || formula >= num_formulas())
        throw py::value_error("formula " + std::to_string(formula) +
                              " is not in this build: sspo_ext._C_cuda is older than the Python code");
    StepParams p = {};
    p.N = narrow<int32_t>("N", sizes[0]);
    p.S = narrow<int32_t>("S", sizes[1]);
    p.P = narrow<int32_t>("P", sizes[2], std::numeric_limits<int32_t>::max() / 2 - 1024);
    p.logp = at<float>(in[0]);
    p.weights = at<float>(in[1]);
    p.step_offsets = at<int32_t>(in[2]);
    p.ref = at<float>(in[3]);
    p.pair_index = at<int32_t>(in[4]);
    p.adj_offsets = at<int32_t>(in[5]);
    p.adj_pairs = at<int32_t>(in[6]);
    p.pair_weights = at<float>(in[7]);
    p.pair_margins = at<float>(in[8]);
    p.pair_labels = at<float>(in[9]);
    p.scale = at<float>(in[10]);
    p.formula = formula;
    for (size_t i = 0; i < options.size() && i < kMaxOptions; ++i) p.options[i] = static_cast<float>(options[i]);
    p.label = static_cast<float>(label);
    p.loss = at<float>(out[0]);
    p.sums = at<float>(out[1]);
    p.pair_loss = at<float>(out[2]);
    p.coef = at<float>(out[3]);
    p.arrived = at<uint32_t>(arrived);
    check(step_loss_fwd(p, device, at<void>(stream)), "step_loss_fwd");
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of sspo_ext; see sspo_ext/backends/cuda.py";
    m.def("token_logp_fwd", &fwd);
    m.def("token_logp_bwd", &bwd);
    m.def("step_loss_fwd", &steps);
    m.def("row_splits", [](int64_t rows, int64_t V, int dtype) { return row_splits(rows, V, to_dtype(dtype)); });
    m.attr("formulas") = formulas_hash();
    m.attr("max_split_rows") = kBlocksWanted;
    m.attr("architectures") = SSPO_CUDA_ARCHITECTURES;
}
