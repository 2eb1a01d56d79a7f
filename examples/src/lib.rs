//! Programs: train, attend, plan.
