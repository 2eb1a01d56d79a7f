// Barrier objects, and copies that are done later: as late as they may be, so that who does not wait for them finds out.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace cooperative_groups {

struct thread_block {};

inline thread_block this_thread_block() {
    return {};
}

}  // namespace cooperative_groups

namespace cuda {

enum thread_scope { thread_scope_thread, thread_scope_block };

// Threads arrive, and wait for the phase to end: it does when as many as expected have arrived, and the copies that belong to it
// are done.
template <thread_scope Scope>
class barrier {
public:
    using arrival_token = unsigned long long;

    arrival_token arrive() {
        const arrival_token token = phase;
        arrive_for(1);
        return token;
    }

    void wait(arrival_token token, uint32_t line = __builtin_LINE()) const { wait_for_phase(token, ~0u, line); }
    void wait_parity(uint32_t parity, uint32_t line = __builtin_LINE()) const { wait_for_phase(parity, 1, line); }
    void arrive_and_wait(uint32_t line = __builtin_LINE()) { wait(arrive(), line); }

    friend void init(barrier* self, uint32_t expected) {
        self->expected = self->pending = expected;
        self->phase = 0;
    }

    // Copies that were begun for the barrier, and not done yet.
    void add_pending(uint32_t arrivals) { pending += arrivals; }

    void arrive_for(uint32_t arrivals) {
        if (arrivals > pending) {
            cuda_emulator_fail("%u threads arrive at a barrier object that waits for %u", arrivals, pending);
        }
        pending -= arrivals;
        if (pending == 0) {
            pending = expected;
            phase += 1;
            ::cuda_emulator::block().events += 1;
        }
    }

private:
    uint16_t expected;
    uint16_t pending;
    uint32_t phase;

    // Until the phase is another than `old`, of which `mask` says what bits count.
    void wait_for_phase(uint32_t old, uint32_t mask, uint32_t line) const {
        barrier* const self = const_cast<barrier*>(this);
        for (;;) {
            const uint32_t done = cuda_emulator_complete_copies(self);
            if (done > 0) self->arrive_for(done);
            if ((*static_cast<volatile uint32_t*>(&self->phase) & mask) != (old & mask)) return;
            cuda_emulator_poll(line);
        }
    }
};

template <thread_scope Scope>
void memcpy_async(void* destination, const void* source, size_t bytes, barrier<Scope>& barrier) {
    cuda_emulator_begin_copy(destination, source, bytes, bytes);
    cuda_emulator_commit_copies(&barrier);
    barrier.add_pending(1);
}

// All threads of the block call it; the first one copies.
template <thread_scope Scope>
void memcpy_async(cooperative_groups::thread_block, void* destination, const void* source, size_t bytes,
                  barrier<Scope>& barrier) {
    if (::cuda_emulator::fiber().index == 0) memcpy_async(destination, source, bytes, barrier);
}

namespace device {

template <thread_scope Scope>
barrier<Scope>* barrier_native_handle(barrier<Scope>& barrier) {
    return &barrier;
}

namespace experimental {

inline void fence_proxy_async_shared_cta() {}

}  // namespace experimental
}  // namespace device
}  // namespace cuda
