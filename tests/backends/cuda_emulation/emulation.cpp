// SPDX-License-Identifier: Apache-2.0
// Blocks, fibers and barriers: see emulation.h. This file is compiled without ThreadSanitizer's instrumentation, since
// the scheduler is no part of what is tested; with -DEMULATION_TSAN it tells ThreadSanitizer about fibers and barriers.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include "cuda_runtime.h"

#if defined(EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr unsigned kConcurrentBlocks = 4;
constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
    unsigned waiting = 0;
    uint64_t passed = 0;  // how often
};

struct Fiber {
    ucontext_t context;
    unsigned index;
    bool done;
    const Barrier* awaited;  // null if it can run
    uint64_t awaited_pass;
    bool has_fenced;  // since the last atomic
    void* last_atomic;
    char* stack;
    void* sanitizer;  // ThreadSanitizer's fiber, AddressSanitizer's fake stack
};

struct Block {
    dim3 grid, size, index;
    void (*body)(const void*);
    const void* argument;
    unsigned threads, alive;
    Barrier barrier, warp_barriers[kMaxThreads / kWarp];
    unsigned warp_alive[kMaxThreads / kWarp];
    uint64_t slots[kMaxThreads];  // what a shuffle exchanges
    Fiber* fibers;
    Fiber* current;
    ucontext_t scheduler;
    void* scheduler_sanitizer;
    const void* scheduler_stack;
    size_t scheduler_stack_bytes;
    char started_word;
};

thread_local Block* block;
int fail_next;
char finished_word;

[[noreturn]] void fail(const char* message) {
    fprintf(stderr, "emulation: %s\n", message);
    abort();
}

void acquire([[maybe_unused]] void* p) {
#if defined(EMULATION_TSAN)
    __tsan_acquire(p);
#endif
}

void release([[maybe_unused]] void* p) {
#if defined(EMULATION_TSAN)
    __tsan_release(p);
#endif
}

void switch_to_scheduler() {
    Block& b = *block;
    Fiber& f = *b.current;
#if defined(EMULATION_TSAN)
    __tsan_switch_to_fiber(b.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(f.done ? nullptr : &f.sanitizer, b.scheduler_stack, b.scheduler_stack_bytes);
#endif
    swapcontext(&f.context, &b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.sanitizer, &b.scheduler_stack, &b.scheduler_stack_bytes);
#endif
}

void switch_to(Fiber& f) {
    Block& b = *block;
    b.current = &f;
#if defined(EMULATION_TSAN)
    __tsan_switch_to_fiber(f.sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&b.scheduler_sanitizer, f.stack, kStackBytes);
#endif
    swapcontext(&b.scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(b.scheduler_sanitizer, nullptr, nullptr);
#endif
}

void pass_if_complete(Barrier& barrier, unsigned alive) {
    if (barrier.waiting && barrier.waiting == alive) {
        barrier.waiting = 0;
        ++barrier.passed;
    }
}

void wait(Barrier& barrier, unsigned alive) {
    Fiber& f = *block->current;
    f.awaited = &barrier;
    f.awaited_pass = barrier.passed;
    ++barrier.waiting;
    pass_if_complete(barrier, alive);
    switch_to_scheduler();
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
    acquire(&block->started_word);
    block->body(block->argument);
    release(&finished_word);
    Block& b = *block;
    Fiber& f = *b.current;
    f.done = true;
    --b.alive;
    --b.warp_alive[f.index / kWarp];
    pass_if_complete(b.barrier, b.alive);  // a thread that has left is not waited for
    pass_if_complete(b.warp_barriers[f.index / kWarp], b.warp_alive[f.index / kWarp]);
    switch_to_scheduler();
}

void* run_block(void* p) {
    block = static_cast<Block*>(p);
    Block& b = *block;
#if defined(EMULATION_TSAN)
    b.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    for (volatile unsigned i = 0; i < b.threads; ++i) {  // volatile: getcontext returns twice, as far as GCC knows
        Fiber& f = b.fibers[i];
        f.index = i;
        f.done = false;
        f.awaited = nullptr;
        f.has_fenced = false;
        f.last_atomic = nullptr;
#if defined(EMULATION_TSAN)
        if (!f.sanitizer) f.sanitizer = __tsan_create_fiber(0);  // kept: it takes half a millisecond
#else
        f.sanitizer = nullptr;
#endif
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack;
        f.context.uc_stack.ss_size = kStackBytes;
        f.context.uc_link = nullptr;
        makecontext(&f.context, fiber_main, 0);
        ++b.warp_alive[i / kWarp];
    }
    b.alive = b.threads;
    release(&b.started_word);
    while (b.alive) {
        bool ran = false;
        for (unsigned i = 0; i < b.threads; ++i) {
            Fiber& f = b.fibers[i];
            if (f.done || (f.awaited && f.awaited->passed == f.awaited_pass)) continue;
            f.awaited = nullptr;
            ran = true;
            switch_to(f);
        }
        if (!ran) fail("deadlock: a barrier that not all threads of the block or warp reach");
    }
    return nullptr;
}

}  // namespace

namespace emulation {

dim3 thread_index() { return block->current->index; }
dim3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }

void block_barrier() {
    Barrier& barrier = block->barrier;
    release(&barrier);
    wait(barrier, block->alive);
    acquire(&barrier);
}

void warp_barrier() {
    const unsigned warp = block->current->index / kWarp;
    Barrier& barrier = block->warp_barriers[warp];
    release(&barrier);
    wait(barrier, block->warp_alive[warp]);
    acquire(&barrier);
}

uint64_t shuffle(uint64_t value, int lane, bool is_xor) {
    Block& b = *block;
    const unsigned self = b.current->index, warp = self / kWarp;
    b.slots[self] = value;
    wait(b.warp_barriers[warp], b.warp_alive[warp]);
    const uint64_t received = b.slots[is_xor ? self ^ static_cast<unsigned>(lane) : warp * kWarp + lane];
    wait(b.warp_barriers[warp], b.warp_alive[warp]);  // all have read: the slots are free again
    return received;
}

// What a thread wrote before a fence is seen by those that fence after an atomic that followed it.
void fence() {
    Fiber& f = *block->current;
    if (f.last_atomic) acquire(f.last_atomic);
    f.has_fenced = true;
}

void before_atomic(void* p) {
    Fiber& f = *block->current;
    if (f.has_fenced) release(p);
    f.has_fenced = false;
    f.last_atomic = p;
}

int run(dim3 grid, dim3 size, void (*body)(const void*), const void* argument) {
    if (const int error = fail_next) {
        fail_next = 0;
        return error;
    }
    if (!grid.x || !grid.y || !size.x || size.x > kMaxThreads || grid.x > 0x7fffffffu || grid.y > 65535u)
        return cudaErrorInvalidConfiguration;
    static Block* blocks;  // launches are made one at a time here
    static unsigned prepared = 0;
    if (!blocks) blocks = static_cast<Block*>(calloc(kConcurrentBlocks, sizeof(Block)));
    if (size.x > prepared) {
        for (unsigned i = 0; i < kConcurrentBlocks; ++i) {
            blocks[i].fibers =
                static_cast<Fiber*>(realloc(static_cast<void*>(blocks[i].fibers), size.x * sizeof(Fiber)));
            for (unsigned t = prepared; t < size.x; ++t) {
                blocks[i].fibers[t].stack = static_cast<char*>(malloc(kStackBytes));
                blocks[i].fibers[t].sanitizer = nullptr;
            }
        }
        prepared = size.x;
    }
    const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y;
    for (uint64_t first = 0; first < count; first += kConcurrentBlocks) {
        pthread_t threads[kConcurrentBlocks];
        const unsigned together =
            static_cast<unsigned>(count - first < kConcurrentBlocks ? count - first : kConcurrentBlocks);
        for (unsigned i = 0; i < together; ++i) {
            Block& b = blocks[i];
            b.grid = grid;
            b.size = size;
            b.index = dim3(static_cast<unsigned>((first + i) % grid.x), static_cast<unsigned>((first + i) / grid.x));
            b.body = body;
            b.argument = argument;
            b.threads = size.x;
            if (pthread_create(&threads[i], nullptr, run_block, &b) != 0) fail("no thread for a block");
        }
        for (unsigned i = 0; i < together; ++i) pthread_join(threads[i], nullptr);
    }
    acquire(&finished_word);
    return cudaSuccess;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void emulation_fail_next(int error) { fail_next = error; }
