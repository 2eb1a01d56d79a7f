// The scheduler: runs the threads of a block as fibers on one thread of the operating system.

#include "runtime.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

using namespace cuda_emulator;

extern "C" {
__thread Fiber* cuda_emulator_fiber;
}

namespace {

// Bytes of the stack of a fiber; pages that it never touches take no memory.
constexpr size_t STACK = 256 * 1024;

enum Order : uint32_t { ascending, descending, random_order };

// A copy that is not done yet.
struct Copy {
    uint32_t thread;
    char* destination;
    const char* source;
    uint32_t bytes;
    uint32_t read;
};

// Copies that are done together: for a barrier, or a group of a thread.
struct Copies {
    uint32_t thread;
    const void* barrier;
    std::vector<Copy> copies;
};

// Stacks and records, used by one block after the other.
struct Workspace {
    char* stacks = nullptr;
    size_t mapped = 0;
    size_t threads = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<uint32_t> order;
    std::vector<Copy> begun;
    std::vector<Copies> committed;
    Block block{};
    void* scheduler = nullptr;
    void (*entry)(void**) = nullptr;
    void** arguments = nullptr;
    bool failed = false;
    char* message = nullptr;
    size_t message_bytes = 0;
    sigjmp_buf landing;
#if !defined(__x86_64__)
    std::vector<ucontext_t> contexts;
    ucontext_t scheduler_context;
#endif
};

__thread Workspace* workspace;

#if defined(__x86_64__)
extern "C" void cuda_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_emulator_switch, . - cuda_emulator_switch
)");
#endif

void to_scheduler() {
#if defined(__x86_64__)
    cuda_emulator_switch(&cuda_emulator_fiber->stack_pointer, workspace->scheduler);
#else
    swapcontext(&workspace->contexts[cuda_emulator_fiber->index], &workspace->scheduler_context);
#endif
}

void to_fiber(Fiber& fiber) {
    cuda_emulator_fiber = &fiber;
#if defined(__x86_64__)
    cuda_emulator_switch(&workspace->scheduler, fiber.stack_pointer);
#else
    swapcontext(&workspace->scheduler_context, &workspace->contexts[fiber.index]);
#endif
    cuda_emulator_fiber = nullptr;
}

// What a fiber does from first to last.
void thread_body() {
    workspace->entry(workspace->arguments);
    Fiber& fiber = *cuda_emulator_fiber;
    Block& block = *fiber.block;
    Warp& warp = *fiber.warp;
    fiber.state = State::exited;
    block.exited += 1;
    block.events += 1;
    if (block.arrived > 0) {
        cuda_emulator_fail(
            "thread %u returned while %u threads of its block wait at a barrier", fiber.index, block.arrived);
    }
    warp.exited_mask |= 1u << fiber.lane;
    if (warp.arrived_mask != 0) {
        cuda_emulator_fail("thread %u returned while lanes of its warp wait at %s (line %u)", fiber.index,
                           warp.operation, warp.line);
    }
    to_scheduler();
    __builtin_unreachable();
}

void prepare(Workspace& work, Fiber& fiber) {
    const size_t page = sysconf(_SC_PAGESIZE);
    char* bottom = work.stacks + fiber.index * (STACK + page) + page;
#if defined(__x86_64__)
    // As if `thread_body` had been called: six registers to pop, the address to return to, and one that it would return to.
    void** top = reinterpret_cast<void**>(bottom + STACK);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&thread_body);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    ucontext_t& context = work.contexts[fiber.index];
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, &thread_body, 0);
#endif
}

struct sigaction previous[NSIG];

const char* name_of(int signal) {
    switch (signal) {
        case SIGSEGV: return "an address outside of every allocation, or a stack that is too small";
        case SIGBUS: return "an address that cannot be";
        case SIGILL: return "a misaligned access, or a local array that was left";
        case SIGFPE: return "an integer division by zero";
        default: return "a fault";
    }
}

void on_fault(int signal, siginfo_t* info, void* context) {
    Workspace* work = workspace;
    if (work != nullptr && cuda_emulator_fiber != nullptr) {
        const uint3 block = work->block.index;
        snprintf(work->message, work->message_bytes, "thread %u of block (%u, %u, %u) met %s (at %p)",
                 cuda_emulator_fiber->index, block.x, block.y, block.z, name_of(signal), info->si_addr);
        siglongjmp(work->landing, 1);
    }
    // Not ours: it happens again, for whoever was there before.
    (void)context;
    sigaction(signal, &previous[signal], nullptr);
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &previous[signal]);
    });
    // A stack for the handler: that of a fiber may be what is full.
    static thread_local std::unique_ptr<char[]> own;
    stack_t now;
    if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE) != 0) {
        const size_t bytes = 64 * 1024;
        own.reset(new char[bytes]);
        stack_t wanted{};
        wanted.ss_sp = own.get();
        wanted.ss_size = bytes;
        sigaltstack(&wanted, nullptr);
    }
}

uint64_t next_random(uint64_t& state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

void shuffle(std::vector<uint32_t>& order, uint64_t& state) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(state) % i]);
}

const char* state_name(const Fiber& fiber) {
    switch (fiber.state) {
        case State::ready: return "runs";
        case State::exited: return "has returned";
        case State::polling: return "polls a barrier object";
        case State::at_block_barrier: return "waits at __syncthreads";
        case State::at_warp_operation: return fiber.operation;
    }
    return "?";
}

void report_deadlock(Workspace& work) {
    const Fiber* first = nullptr;
    const Fiber* other = nullptr;
    for (const Fiber& fiber : work.fibers) {
        if (fiber.index >= work.block.threads) break;
        if (first == nullptr && fiber.state != State::exited) first = &fiber;
        if (first != nullptr && other == nullptr && (fiber.state != first->state || fiber.line != first->line)) {
            other = &fiber;
        }
    }
    const uint3 block = work.block.index;
    if (other == nullptr) other = first;
    snprintf(work.message, work.message_bytes,
             "the threads of block (%u, %u, %u) wait for each other for ever: thread %u %s (line %u), thread %u %s (line %u)",
             block.x, block.y, block.z, first->index, state_name(*first), first->line, other->index,
             state_name(*other), other->line);
}

// Runs fibers until all have returned. False if they wait for each other.
bool schedule(Workspace& work, Order order, uint64_t& seed) {
    while (work.block.exited < work.block.threads) {
        if (order == random_order) shuffle(work.order, seed);
        const uint64_t before = work.block.events;
        bool ran = false;
        for (uint32_t index : work.order) {
            Fiber& fiber = work.fibers[index];
            if (fiber.state != State::ready && fiber.state != State::polling) continue;
            ran |= fiber.state == State::ready;
            fiber.state = State::ready;
            to_fiber(fiber);
            if (work.failed) return false;
        }
        if (!ran && work.block.events == before) {
            report_deadlock(work);
            return false;
        }
    }
    return true;
}

}  // namespace

extern "C" void cuda_emulator_fail(const char* format, ...) {
    const uint3 block = workspace->block.index;
    const int written = snprintf(workspace->message, workspace->message_bytes, "block (%u, %u, %u): ", block.x,
                                 block.y, block.z);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(workspace->message + written, workspace->message_bytes - written, format, arguments);
    va_end(arguments);
    workspace->failed = true;
    to_scheduler();
    __builtin_unreachable();
}

extern "C" void cuda_emulator_block_barrier(uint32_t line) {
    Fiber& fiber = *cuda_emulator_fiber;
    Block& block = *fiber.block;
    if (block.exited > 0) {
        cuda_emulator_fail("thread %u waits at __syncthreads (line %u), but %u threads of its block have returned",
                           fiber.index, line, block.exited);
    }
    block.arrived += 1;
    fiber.line = line;
    if (block.arrived == block.threads) {
        block.arrived = 0;
        block.events += 1;
        for (uint32_t i = 0; i < block.threads; ++i) workspace->fibers[i].state = State::ready;
    } else {
        fiber.state = State::at_block_barrier;
    }
    to_scheduler();
}

extern "C" uint32_t cuda_emulator_warp_operation(
    const char* operation, uint32_t line, const void* given, size_t bytes, Combine combine) {
    Fiber& fiber = *cuda_emulator_fiber;
    Warp& warp = *fiber.warp;
    if (warp.arrived_mask == 0) {
        warp.operation = operation;
        warp.line = line;
    } else if (warp.line != line || strcmp(warp.operation, operation) != 0) {
        cuda_emulator_fail("lanes of a warp are at different operations: thread %u at %s (line %u), others at %s (line %u)",
                           fiber.index, operation, line, warp.operation, warp.line);
    }
    if (warp.exited_mask != 0) {
        cuda_emulator_fail("thread %u is at %s (line %u), but lanes of its warp have returned", fiber.index, operation,
                           line);
    }
    const uint32_t turn = warp.turn;
    memcpy(warp.given[turn][fiber.lane], given, bytes);
    warp.arrived_mask |= 1u << fiber.lane;
    if (warp.arrived_mask == live_lanes(warp)) {
        if (combine != nullptr) combine(warp, warp.given[turn], warp.taken[turn]);
        warp.arrived_mask = 0;
        warp.turn = 1 - turn;
        fiber.block->events += 1;
        const uint32_t first = fiber.index - fiber.lane;
        for (uint32_t lane = 0; lane < warp.lanes; ++lane) {
            Fiber& other = workspace->fibers[first + lane];
            if (other.state == State::at_warp_operation) other.state = State::ready;
        }
    } else {
        fiber.state = State::at_warp_operation;
        fiber.operation = operation;
        fiber.line = line;
    }
    to_scheduler();
    return turn;
}

extern "C" void cuda_emulator_poll(uint32_t line) {
    cuda_emulator_fiber->state = State::polling;
    cuda_emulator_fiber->line = line;
    to_scheduler();
}

extern "C" void cuda_emulator_begin_copy(void* destination, const void* source, uint32_t bytes, uint32_t read) {
    if (reinterpret_cast<uintptr_t>(destination) % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0) {
        if (bytes == 4 || bytes == 8 || bytes == 16) {
            cuda_emulator_fail("a copy of %u bytes from %p to %p: both must be multiples of %u", bytes, source, destination,
                               bytes);
        }
    }
    memset(destination, 0xFF, bytes);
    workspace->begun.push_back({cuda_emulator_fiber->index, static_cast<char*>(destination),
                                static_cast<const char*>(source), bytes, std::min(bytes, read)});
}

extern "C" void cuda_emulator_commit_copies(const void* barrier) {
    Copies committed{cuda_emulator_fiber->index, barrier, {}};
    auto& begun = workspace->begun;
    const auto others = std::stable_partition(
        begun.begin(), begun.end(), [&](const Copy& copy) { return copy.thread != committed.thread; });
    committed.copies.assign(others, begun.end());
    begun.erase(others, begun.end());
    workspace->committed.push_back(std::move(committed));
}

namespace {

void complete(const Copies& committed) {
    for (const Copy& copy : committed.copies) {
        memcpy(copy.destination, copy.source, copy.read);
        memset(copy.destination + copy.read, 0, copy.bytes - copy.read);
    }
}

}  // namespace

extern "C" uint32_t cuda_emulator_complete_copies(const void* barrier) {
    uint32_t count = 0;
    std::erase_if(workspace->committed, [&](const Copies& committed) {
        if (committed.barrier != barrier) return false;
        complete(committed);
        count += 1;
        return true;
    });
    return count;
}

extern "C" void cuda_emulator_complete_groups(uint32_t last) {
    const uint32_t thread = cuda_emulator_fiber->index;
    const auto own = [&](const Copies& committed) { return committed.barrier == nullptr && committed.thread == thread; };
    auto& all = workspace->committed;
    const size_t groups = std::count_if(all.begin(), all.end(), own);
    size_t left = groups > last ? groups - last : 0;
    std::erase_if(all, [&](const Copies& committed) {
        if (left == 0 || !own(committed)) return false;
        complete(committed);
        left -= 1;
        return true;
    });
}

extern "C" Workspace* cuda_emulator_workspace(uint32_t threads) {
    const size_t page = sysconf(_SC_PAGESIZE);
    auto work = std::make_unique<Workspace>();
    work->threads = threads;
    work->mapped = threads * (STACK + page);
    void* stacks = mmap(nullptr, work->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return nullptr;
    work->stacks = static_cast<char*>(stacks);
    for (size_t i = 0; i < threads; ++i) mprotect(work->stacks + i * (STACK + page), page, PROT_NONE);
    work->fibers.resize(threads);
    work->warps.resize((threads + WARP - 1) / WARP);
#if !defined(__x86_64__)
    work->contexts.resize(threads);
#endif
    return work.release();
}

extern "C" void cuda_emulator_free_workspace(Workspace* work) {
    munmap(work->stacks, work->mapped);
    delete work;
}

struct Launch {
    void (*entry)(void** arguments);
    void** arguments;
    uint3 grid;
    uint3 dimensions;
    char* shared;
    uint32_t shared_bytes;
    uint32_t order;
    uint64_t seed;
};

// Runs one block. 0, or 1 with an error in `message`.
extern "C" int cuda_emulator_run_block(
    Workspace* work, const Launch* launch, const uint3* index, char* message, size_t message_bytes) {
    catch_faults();
    const uint32_t threads = launch->dimensions.x * launch->dimensions.y * launch->dimensions.z;
    work->block = Block{launch->grid, launch->dimensions, *index, launch->shared, launch->shared_bytes, threads, 0, 0, 0};
    work->entry = launch->entry;
    work->arguments = launch->arguments;
    work->failed = false;
    work->begun.clear();
    work->committed.clear();
    work->message = message;
    work->message_bytes = message_bytes;
    for (uint32_t i = 0; i < (threads + WARP - 1) / WARP; ++i) {
        Warp& warp = work->warps[i];
        warp.lanes = std::min(WARP, threads - i * WARP);
        warp.exited_mask = warp.arrived_mask = warp.turn = 0;
    }
    work->order.resize(threads);
    for (uint32_t i = 0; i < threads; ++i) {
        work->order[i] = launch->order == descending ? threads - 1 - i : i;
        Fiber& fiber = work->fibers[i];
        const uint32_t x = i % launch->dimensions.x;
        const uint32_t y = i / launch->dimensions.x % launch->dimensions.y;
        const uint32_t z = i / launch->dimensions.x / launch->dimensions.y;
        fiber = Fiber{nullptr, &work->warps[i / WARP], &work->block, {x, y, z}, i, i % WARP, State::ready, "", 0};
        prepare(*work, fiber);
    }
    uint64_t seed = launch->seed;
    for (uint32_t part : {index->x, index->y, index->z}) seed = (seed ^ part) * 0x9E3779B97F4A7C15ull;
    seed |= 1;
    Workspace* outer = workspace;
    workspace = work;
    int failed;
    if (sigsetjmp(work->landing, 1) == 0) {
        failed = schedule(*work, static_cast<Order>(launch->order), seed) ? 0 : 1;
    } else {
        failed = 1;
    }
    cuda_emulator_fiber = nullptr;
    workspace = outer;
    return failed;
}
