// SPDX-License-Identifier: Apache-2.0
// The CPU kernels as a Python module. It takes addresses and sizes and knows nothing of torch. The caller,
// sspo_ext/backends/cpu.py, checks shapes, dtypes and strides. sspo_ext/_C.pyi has the signatures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../formulas_generated.h"
#include "dispatch.h"
#include "step_loss.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // tensor.data_ptr(), or 0 for None
using Sizes = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 2>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

sspo::DType to_dtype(int code) {
    if (code < 0 || code > 3) throw py::value_error("dtype code must be 0..3");
    return static_cast<sspo::DType>(code);
}

sspo::Logits to_logits(Address data, int dtype, const Sizes& sizes, const Strides& strides, double a, double c) {
    const auto [B, T, V] = sizes;
    if (B < 0 || T < 0 || V < 0) throw py::value_error("sizes must not be negative");
    return {at<void>(data), to_dtype(dtype), strides[0], strides[1], B * T, std::max<int64_t>(T, 1), V, a, c};
}

void token_logp_fwd(Address logits, int dtype, Sizes sizes, Strides strides, Address rows, Address labels, int64_t N,
                    double a, double c, Address logp, Address lse, int threads) {
    const sspo::Isa& isa = sspo::choose_isa();
    const sspo::FwdArgs args{to_logits(logits, dtype, sizes, strides, a, c), at<int64_t>(rows), at<int64_t>(labels),
                             at<void>(logp), at<double>(lse)};
    py::gil_scoped_release release;
    sspo::token_logp_fwd(*isa.kernels, args, N, threads);
}

void token_logp_bwd(Address logits, int dtype, Sizes sizes, Strides strides, Address row_of, Address labels,
                    Address lse, Address coef, Address upstream, int64_t N, double a, double c, Address out,
                    Strides out_strides, int threads) {
    const sspo::Isa& isa = sspo::choose_isa();
    const sspo::BwdArgs args{to_logits(logits, dtype, sizes, strides, a, c),
                             at<int32_t>(row_of),
                             at<int64_t>(labels),
                             at<double>(lse),
                             at<void>(coef),
                             at<void>(upstream),
                             N,
                             at<void>(out),
                             out_strides[0],
                             out_strides[1],
                             false};
    py::gil_scoped_release release;
    sspo::token_logp_bwd(*isa.kernels, args, threads);
}

// The map and sizes of the logits; `data` is 0 where there is no reference.
sspo::Logits reference_of(const sspo::Logits& logits, Address data, const Strides& strides) {
    sspo::Logits ref = logits;
    ref.data = at<void>(data), ref.stride_b = strides[0], ref.stride_t = strides[1];
    return ref;
}

void row_reductions_fwd(Address logits, int dtype, Sizes sizes, Strides strides, Address ref, Strides ref_strides,
                        Address rows, Address labels, int64_t N, double a, double c, std::array<Address, 6> out,
                        int threads) {
    const sspo::Isa& isa = sspo::choose_isa();
    const sspo::Logits l = to_logits(logits, dtype, sizes, strides, a, c);
    const sspo::ReductionArgs args{l,
                                   reference_of(l, ref, ref_strides),
                                   at<int64_t>(rows),
                                   at<int64_t>(labels),
                                   at<void>(out[0]),
                                   at<void>(out[2]),
                                   at<void>(out[3]),
                                   at<void>(out[4]),
                                   at<double>(out[1]),
                                   at<double>(out[5])};
    py::gil_scoped_release release;
    sspo::row_reductions_fwd(*isa.kernels, args, N, threads);
}

void row_reductions_bwd(Address logits, int dtype, Sizes sizes, Strides strides, Address ref, Strides ref_strides,
                        Address row_of, Address labels, Address lse, Address ref_lse, Address coefs, int64_t N,
                        double a, double c, Address out, Strides out_strides, int threads) {
    const sspo::Isa& isa = sspo::choose_isa();
    const sspo::Logits l = to_logits(logits, dtype, sizes, strides, a, c);
    const sspo::ReductionGradArgs args{l,
                                       reference_of(l, ref, ref_strides),
                                       at<int32_t>(row_of),
                                       at<int64_t>(labels),
                                       at<double>(lse),
                                       at<double>(ref_lse),
                                       at<void>(coefs),
                                       N,
                                       at<void>(out),
                                       out_strides[0],
                                       out_strides[1],
                                       false};
    py::gil_scoped_release release;
    sspo::row_reductions_bwd(*isa.kernels, args, threads);
}

template <class T>
void step_loss(const Sizes& sizes, const std::array<Address, 11>& in, int formula, const std::vector<double>& options,
               double label, const std::array<Address, 4>& out) {
    std::array<T, sspo::kMaxOptions> values{};
    for (size_t i = 0; i < options.size() && i < values.size(); ++i) values[i] = (T)options[i];
    sspo::step_loss_fwd<T>({sizes[0],           sizes[1],
                            sizes[2],           at<T>(in[0]),
                            at<T>(in[1]),       at<int32_t>(in[2]),
                            at<T>(in[3]),       at<int32_t>(in[4]),
                            at<int32_t>(in[5]), at<int32_t>(in[6]),
                            at<T>(in[7]),       at<T>(in[8]),
                            at<T>(in[9]),       formula,
                            values.data(),      (T)label,
                            at<T>(in[10]),      at<T>(out[0]),
                            at<T>(out[1]),      at<T>(out[2]),
                            at<T>(out[3])});
}

void step_loss_fwd(bool is_double, Sizes sizes, std::array<Address, 11> in, int formula, std::vector<double> options,
                   double label, std::array<Address, 4> out) {
    if (formula < 0 || formula >= sspo::kNumPairFormulas)
        throw py::value_error("formula " + std::to_string(formula) +
                              " is not in this build: sspo_ext._C is older than the Python code");
    py::gil_scoped_release release;
    is_double ? step_loss<double>(sizes, in, formula, options, label, out)
              : step_loss<float>(sizes, in, formula, options, label, out);
}

void add_product(Address total, Address gradient, Address hidden, Sizes strides, Sizes sizes, bool first, int threads) {
    const sspo::ProductChoice choice = sspo::choose_product();
    if (!choice.product) throw std::runtime_error(choice.why_not);
    const auto [n, V, H] = sizes;
    if (n < 0 || V < 0 || H < 0) throw py::value_error("sizes must not be negative");
    const sspo::ProductArgs args{at<float>(total),
                                 at<uint16_t>(gradient),
                                 at<uint16_t>(hidden),
                                 strides[0],
                                 strides[1],
                                 strides[2],
                                 n,
                                 V,
                                 H,
                                 first};
    py::gil_scoped_release release;
    sspo::add_product(*choice.product, args, threads);
}

void prepare_large_output(Address data, int64_t bytes) { sspo::prepare_large_output(at<void>(data), bytes); }

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of sspo_ext; see sspo_ext/backends/cpu.py";
    m.attr("formulas") = sspo::kFormulasHash;
    m.def("token_logp_fwd", &token_logp_fwd);
    m.def("token_logp_bwd", &token_logp_bwd);
    m.def("row_reductions_fwd", &row_reductions_fwd);
    m.def("row_reductions_bwd", &row_reductions_bwd);
    m.def("step_loss_fwd", &step_loss_fwd);
    m.def("add_product", &add_product);
    m.def(
        "product_why_not", [] { return sspo::choose_product().why_not; },
        "Why add_product cannot run here ('' where it can).");
    m.def("prepare_large_output", &prepare_large_output);
    m.def("isa", [] { return sspo::choose_isa().name; }, "The instruction set in use; SSPO_CPU_ISA names another.");
    m.def(
        "isas",
        [] {
            py::dict found;
            for (const sspo::Isa& isa : sspo::isas()) found[py::str(isa.name)] = isa.why_not;
            return found;
        },
        "Instruction set -> why it cannot run here ('' where it can).");
}
