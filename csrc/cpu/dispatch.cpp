// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sspo {

namespace {

// Less data than this does not repay the start of a thread. Blocks of this size let all threads end at about the same
// time.
constexpr int64_t kBlockBytes = 1 << 20;
// Two threads that touch the same fresh 2 MiB page both clear it. Blocks of fresh memory hold many such pages, so that
// few are shared.
constexpr int64_t kFreshBlockBytes = 16 << 20;
// An output of at least this size is larger than the caches, and malloc gives it a mapping of its own.
constexpr int64_t kLargeBytes = 32 << 20;

int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::kFloat64:
            return 8;
        case DType::kFloat32:
            return 4;
        default:
            return 2;
    }
}

int64_t rows_per_block(const Logits& l, int64_t bytes = kBlockBytes) {
    return std::max<int64_t>(1, bytes / std::max<int64_t>(1, l.V * element_size(l.dtype)));
}

#if defined(__x86_64__)
bool has_f16c() {  // only newer compilers know the name in __builtin_cpu_supports
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx512_bf16() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5);
}
#endif

std::vector<Isa> detect() {
    std::vector<Isa> found = {{"baseline", "", &kBaseline}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    std::string missing2, missing512;
    const auto need = [](std::string& missing, bool has, const char* name) {
        if (!has) missing += missing.empty() ? name : std::string(", ") + name;
    };
    need(missing2, __builtin_cpu_supports("avx2"), "AVX2");
    need(missing2, __builtin_cpu_supports("fma"), "FMA");
    need(missing2, has_f16c(), "F16C");
    need(missing512, __builtin_cpu_supports("avx512f"), "AVX512F");
    need(missing512, __builtin_cpu_supports("avx512bw"), "AVX512BW");
    need(missing512, __builtin_cpu_supports("avx512dq"), "AVX512DQ");
    need(missing512, __builtin_cpu_supports("avx512vl"), "AVX512VL");
    const auto reason = [](const std::string& missing) {
        return missing.empty() ? missing : "this CPU lacks " + missing;
    };
    found.push_back({"avx2", reason(missing2), &kAvx2});
    found.push_back({"avx512", reason(missing2.empty() ? missing512 : missing2), &kAvx512});
#else
    for (const char* name : {"avx2", "avx512"}) found.push_back({name, "this build is not for x86-64", nullptr});
#endif
    return found;
}

}  // namespace

const std::vector<Isa>& isas() {
    static const std::vector<Isa> found = detect();
    return found;
}

const Isa& choose_isa() {
    const char* wanted = std::getenv("SSPO_CPU_ISA");
    if (wanted && *wanted) {
        std::string names;
        for (const Isa& isa : isas()) {
            if (isa.name == wanted) {
                if (isa.why_not.empty()) return isa;
                throw std::runtime_error("SSPO_CPU_ISA=" + isa.name + " cannot run here: " + isa.why_not);
            }
            names += (names.empty() ? "" : ", ") + isa.name;
        }
        throw std::runtime_error("SSPO_CPU_ISA must be one of " + names + ", got '" + wanted + "'");
    }
    const Isa* best = &isas().front();
    for (const Isa& isa : isas())
        if (isa.why_not.empty()) best = &isa;
    return *best;
}

ProductChoice choose_product() {
#if defined(__x86_64__)
    if (choose_isa().kernels != &kAvx512) return {nullptr, "the instruction set in use is not avx512"};
    static const bool has_instructions = has_avx512_bf16();  // a virtual machine traps the question
    if (!has_instructions) return {nullptr, "this CPU lacks AVX512_BF16"};
    if (!kAvx512Bf16Product) return {nullptr, "the compiler of this build is older than AVX512_BF16"};
    return {kAvx512Bf16Product, ""};
#else
    return {nullptr, "this build is not for x86-64"};
#endif
}

bool prepare_large_output(void* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + bytes) / page * page;
    unsigned char resident = 1;
    if (mincore((void*)(begin + (end - begin) / 2 / page * page), 1, &resident) == 0 && !(resident & 1)) {
        madvise((void*)begin, end - begin, MADV_HUGEPAGE);
        return false;
    }
#else
    (void)data, (void)bytes;
#endif
    return true;
}

namespace {

// The OpenMP runtime that torch has loaded, if any. Its threads spin for a while after each of torch's operations:
// threads of our own would wait for the cores that those hold.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel openmp_parallel() {
#if defined(__linux__)
    static std::atomic<bool> forked{false};  // a child has none of its parent's threads, and OpenMP would wait for them
    static const auto found = [] {
        pthread_atfork(nullptr, nullptr, [] { forked = true; });
        return (OpenMpParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    }();
    return forked ? nullptr : found;
#else
    return nullptr;
#endif
}

struct Blocks {
    std::atomic<int64_t> next{0};
    int64_t count, block, blocks;
    const std::function<void(int64_t, int64_t)>& work;

    void run() {
        for (int64_t b; (b = next.fetch_add(1)) < blocks;) work(b * block, std::min(count, (b + 1) * block));
    }
};

}  // namespace

void parallel_for(int64_t count, int64_t block, int threads, const std::function<void(int64_t, int64_t)>& work) {
    Blocks blocks{{0}, count, block, (count + block - 1) / block, work};
    const int64_t wanted = std::min<int64_t>(threads, blocks.blocks);
    if (wanted <= 1) return blocks.run();
    // All threads, also those that get no block: OpenMP ends the threads that a smaller team leaves out.
    if (const auto parallel = openmp_parallel())
        return parallel([](void* data) { ((Blocks*)data)->run(); }, &blocks, (unsigned)threads, 0);
    std::vector<std::thread> helpers;
    helpers.reserve(wanted - 1);
    try {
        for (int64_t t = 1; t < wanted; ++t) helpers.emplace_back([&] { blocks.run(); });
    } catch (const std::system_error&) {
        // The system gives no more threads: those that started share the work.
    }
    blocks.run();
    for (std::thread& t : helpers) t.join();
}

namespace {

template <class Args, class Work>
void forward(const Args& args, int64_t N, int threads, const Work& work) {
    parallel_for(N, rows_per_block(args.logits), threads, [&](int64_t begin, int64_t end) { work(args, begin, end); });
}

// Over all positions, into args.out.
template <class Args, class Work>
void backward(Args args, int threads, const Work& work) {
    const int64_t count = args.logits.positions, bytes = count * args.logits.V * element_size(args.logits.dtype);
    int64_t block_bytes = kBlockBytes;
    if (args.out != args.logits.data && bytes >= kLargeBytes) {
        args.stream = prepare_large_output(args.out, bytes);
        if (!args.stream) block_bytes = std::clamp(bytes / (8 * std::max(threads, 1)), kBlockBytes, kFreshBlockBytes);
    }
    // The last rows first, as inside a block.
    parallel_for(count, rows_per_block(args.logits, block_bytes), threads,
                 [&](int64_t begin, int64_t end) { work(args, count - end, count - begin); });
}

}  // namespace

void add_product(const Product& product, const ProductArgs& args, int threads) {
    if (args.V == 0 || args.H == 0) return;
    constexpr int64_t kLine = 64;
    std::vector<uint32_t> buffer((size_t)(product.packed_size(args) + kLine / 4));
    uint32_t* packed = (uint32_t*)(((uintptr_t)buffer.data() + kLine - 1) / kLine * kLine);
    const int64_t pairs = (args.n + 1) / 2, pairs_a_block = std::max<int64_t>(1, kBlockBytes / (4 * args.H));
    parallel_for(pairs, pairs_a_block, threads,
                 [&](int64_t begin, int64_t end) { product.pack(args, packed, begin, end); });
    // `total` may be fresh memory, see kFreshBlockBytes.
    const int64_t row_bytes = 4 * args.H, bytes = args.V * row_bytes,
                  block = std::clamp(bytes / (8 * std::max(threads, 1)), kBlockBytes, kFreshBlockBytes);
    const int64_t rows = std::max<int64_t>(1, block / row_bytes / product.block_rows) * product.block_rows;
    parallel_for(args.V, rows, threads,
                 [&](int64_t begin, int64_t end) { product.multiply(args, packed, begin, end); });
}

void token_logp_fwd(const Kernels& kernels, const FwdArgs& args, int64_t N, int threads) {
    forward(args, N, threads, kernels.token_logp_fwd);
}

void token_logp_bwd(const Kernels& kernels, const BwdArgs& args, int threads) {
    backward(args, threads, kernels.token_logp_bwd);
}

void row_reductions_fwd(const Kernels& kernels, const ReductionArgs& args, int64_t N, int threads) {
    forward(args, N, threads, kernels.row_reductions_fwd);
}

void row_reductions_bwd(const Kernels& kernels, const ReductionGradArgs& args, int threads) {
    backward(args, threads, kernels.row_reductions_bwd);
}

}  // namespace sspo
