//! What a pass will allocate: [`Needs`].
//!
//! What is made at the beginning is handed out as it was reserved: state, gradients, messages, and what is gathered if heads are divided.
//! What kernels allocate by themselves (`delta`, rounded results), and what is made again and again for queries that visit, is
//! freed right before it is asked for. Two things lie where others lay before, and are not reserved again: rounded results beyond what the
//! sums that were rounded before them leave, and, if heads are divided, all that travels home.

use ring_comm::buffer::{Buffer, DType};
use ring_kernels::{KernelError, Kernels, Problem};

use super::{
    messages::Most,
    reserved::{Piece, Stash, Use},
};
use crate::{
    driver::Run,
    exchange::Pass,
    memory::sums,
    regroup::Regroup,
    schedule::{QueryParcel, ScheduledStep},
};

/// What a pass of one rank will allocate.
pub(super) struct Needs<'a> {
    problem: &'a Problem,
    backward: bool,
    dtype: DType,
    /// Elements of a message of rows or gradients.
    capacity: usize,
    messages: Most,
    pieces: Vec<(Use, DType, usize)>,
}

impl<'a> Needs<'a> {
    /// Those of a pass.
    pub(super) fn of<B: Buffer, K: Kernels<B>>(run: &'a Run<'_, B, K>) -> Self {
        let (plan, problem) = (run.plan, &run.exchanger.problem);
        let backward = matches!(run.exchanger.pass, Pass::Backward);
        let schedule = plan.schedule();
        let steps = if backward {
            schedule.backward()
        } else {
            &schedule.steps
        };
        let mut needs = Self {
            problem,
            backward,
            dtype: run.exchanger.dtype,
            capacity: run.exchanger.capacity,
            messages: Most::of(steps, plan.lookahead(), backward),
            pieces: Vec::new(),
        };
        if let Some(regroup) = plan.regroup() {
            needs.add_gathered(regroup, &run.own);
        }
        if backward {
            let rows = run.own.statistic_shape().elements();
            needs.add(Use::Delta, DType::F32, rows);
        }
        if problem.kv_heads > 0 {
            needs.add_results();
            needs.add_guests(steps);
        }
        needs
    }

    fn add(&mut self, purpose: Use, dtype: DType, len: usize) {
        if len > 0 {
            self.pieces.push((purpose, dtype, len));
        }
    }

    /// Messages to those who divide the heads, and the tensors that theirs are placed in.
    fn add_gathered(&mut self, regroup: &Regroup, own: &Problem) {
        let dtype = self.dtype;
        let tensors = if self.backward { 2 } else { 1 };
        let group = own.group_size();
        for member in &regroup.members {
            let part = Problem {
                kv_heads: member.kv_heads.len(),
                query_heads: member.kv_heads.len() * group,
                ..own.clone()
            };
            let [queries, keys] = [part.query_shape(), part.key_shape()];
            self.add(Use::Pack, dtype, tensors * queries.elements());
            self.add(Use::Pack, dtype, 2 * keys.elements());
            if self.backward {
                let numbers = part.statistic_shape();
                self.add(Use::Pack, DType::F32, 2 * numbers.elements());
            }
        }
        let problem = self.problem;
        for _ in 0..tensors {
            self.add(Use::Zeros, dtype, problem.query_shape().elements());
        }
        for _ in 0..2 {
            self.add(Use::Zeros, dtype, problem.key_shape().elements());
            if self.backward {
                let numbers = problem.statistic_shape().elements();
                self.add(Use::Zeros, DType::F32, numbers);
            }
        }
    }

    /// Sums, and room for what they are rounded to.
    fn add_results(&mut self) {
        let [queries, keys] = [self.problem.query_shape(), self.problem.key_shape()];
        let [queries, keys] = [queries.elements(), keys.elements()];
        let mut results = vec![queries];
        if self.backward {
            results.extend([keys, keys]);
            for &len in &results {
                self.add(Use::Zeros, DType::F32, len);
            }
        }
        let size = self.dtype.size();
        if size < DType::F32.size() {
            let results: Vec<u64> = results.iter().map(|&len| len as u64).collect();
            let all: u64 = results.iter().sum();
            // Beyond the sums themselves.
            let room = sums(&results, size as u64) + all * size as u64 - 4 * all;
            self.add(Use::Results, self.dtype, room as usize / size);
        }
    }

    /// What the most of queries that visit at one time take: their numbers as they travel and as they are used, and gradients.
    fn add_guests(&mut self, steps: &[ScheduledStep]) {
        let exchanges = || steps.iter().filter_map(|step| step.exchange.as_ref());
        let largest = |len: fn(&QueryParcel) -> usize| {
            let parcels = exchanges().filter_map(|hop| hop.receive_queries.as_ref());
            parcels.map(len).max().unwrap_or(0)
        };
        let numbers = largest(|parcel| parcel.statistic_shape().elements());
        let gradients = largest(|parcel| parcel.shape.elements());
        let leaving = exchanges().filter_map(|hop| hop.send_queries.as_ref());
        let leaving = leaving.map(|parcel| parcel.statistics.len()).max();
        for len in [numbers, numbers, gradients, leaving.unwrap_or(0)] {
            self.add(Use::Guests, DType::F32, len);
        }
    }

    /// Allocates all of it with these kernels. Messages lie in the pool then, as far as it keeps them.
    pub(super) fn reserve<B: Buffer, K: Kernels<B>, R>(
        &self,
        kernels: &K,
        run: &Run<'_, B, R>,
    ) -> Result<Stash<B>, KernelError> {
        let mut stash = Stash::default();
        if self.problem.kv_heads > 0 {
            if !self.backward {
                stash.state = Some(kernels.start(self.problem)?);
            }
            kernels.reserve(self.problem, self.backward)?;
        }
        for &(purpose, dtype, len) in &self.pieces {
            let buffer = kernels.allocate(dtype, len, None)?;
            stash.pieces.push(Piece {
                purpose,
                dtype,
                len,
                buffer,
            });
        }
        self.reserve_messages(kernels, run, &mut stash)?;
        Ok(stash)
    }

    fn reserve_messages<B: Buffer, K: Kernels<B>, R>(
        &self,
        kernels: &K,
        run: &Run<'_, B, R>,
        stash: &mut Stash<B>,
    ) -> Result<(), KernelError> {
        let pool = run.exchanger.communicator.buffers();
        let Most {
            rows,
            gradients,
            together,
        } = self.messages;
        let counts = match self.dtype {
            DType::F32 => vec![(DType::F32, together)],
            dtype => vec![(dtype, rows), (DType::F32, gradients)],
        };
        for (dtype, count) in counts {
            let kept: Vec<B> = (0..count)
                .map_while(|_| pool.take(dtype, self.capacity))
                .collect();
            let missing = count - kept.len();
            let fresh = (0..missing).map(|_| kernels.allocate(dtype, self.capacity, None));
            let fresh: Result<Vec<B>, KernelError> = fresh.collect();
            // Whatever came of it, and first of all: it had room there.
            kept.into_iter().for_each(|buffer| pool.give(buffer));
            for buffer in fresh? {
                // Zeros still, unlike what was kept.
                if let Some(buffer) = pool.offer(buffer) {
                    let (purpose, len) = (Use::Zeros, self.capacity);
                    stash.pieces.push(Piece {
                        purpose,
                        dtype,
                        len,
                        buffer,
                    });
                }
            }
        }
        Ok(())
    }
}
