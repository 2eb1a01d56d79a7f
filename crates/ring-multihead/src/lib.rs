//! Multi-head ring dilated attention, factory and LongNet model for Burn.
