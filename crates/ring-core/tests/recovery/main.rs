//! Refused memory is tried for again, and never changes a number; a lost peer is an error of every rank, counted and logged.

#[path = "../cases/mod.rs"]
mod cases;
mod events;
mod lost;
mod ranks;
mod refused;
