//! What is logged: a subscriber of `tracing` that remembers.

use std::{
    fmt::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

/// Level and fields of the events of a thread, as ` name=value` each.
#[derive(Clone, Default)]
pub(crate) struct Events {
    events: Arc<Mutex<Vec<(Level, String)>>>,
    spans: Arc<AtomicU64>,
}

impl Events {
    /// What was logged while `work` was done on this thread.
    pub(crate) fn of<T>(work: impl FnOnce() -> T) -> (T, Vec<(Level, String)>) {
        let events = Self::default();
        let result = tracing::subscriber::with_default(events.clone(), work);
        let logged = events.events.lock().unwrap().clone();
        (result, logged)
    }
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("ring_core")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        let mut events = self.events.lock().unwrap();
        events.push((*event.metadata().level(), fields.0));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
