//! Where a swap is, and where it failed.

use std::fmt;

/// Where a swap is.
///
/// ```text
/// Serving → Instantiated → Gated → Drained → Saved → Restored → Committed → Serving (the new)
///    ↑            │           │        │        │         │
///    └────────────┴───────────┴────────┴────────┴─────────┘ on_failure (the old)
/// ```
///
/// Both transitions are total: there is no phase from which they are a mistake to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Phase {
    /// One generation serves; no swap, or its new generation is still being built.
    #[default]
    Serving,
    /// The new generation is built and initialized. The old one still serves.
    Instantiated,
    /// The gate is closed, or being closed. Calls wait from here to the end.
    Gated,
    /// Nothing is in flight.
    Drained,
    /// The state of the old generation is saved, or saving it was skipped.
    Saved,
    /// The new generation holds the saved state.
    Restored,
    /// The new generation is published. From here nothing can fail.
    Committed,
}

impl Phase {
    /// The phase after this one; after `Committed` the new generation is `Serving`.
    #[must_use]
    pub const fn advance(self) -> Self {
        match self {
            Self::Serving => Self::Instantiated,
            Self::Instantiated => Self::Gated,
            Self::Gated => Self::Drained,
            Self::Drained => Self::Saved,
            Self::Saved => Self::Restored,
            Self::Restored => Self::Committed,
            Self::Committed => Self::Serving,
        }
    }

    /// The phase after a failure: the old generation is `Serving`. A committed swap stays
    /// committed.
    #[must_use]
    pub const fn on_failure(self) -> Self {
        if self.is_committed() {
            self
        } else {
            Self::Serving
        }
    }

    /// Whether calls wait at the gate in this phase.
    pub const fn is_gated(self) -> bool {
        !matches!(self, Self::Serving | Self::Instantiated)
    }

    /// Whether the new generation is published.
    pub const fn is_committed(self) -> bool {
        matches!(self, Self::Committed)
    }
}

/// The step in which a swap failed, under the name that users see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailedPhase {
    /// What was in flight did not end in time.
    Drain,
    /// The user's saveState failed.
    Save,
    /// The new generation could not be built.
    Instantiate,
    /// The new generation's own initialization failed.
    Initialize,
    /// The user's restoreState failed.
    Restore,
}

impl FailedPhase {
    /// Every failed phase, in the order of the words in the public interface.
    pub const ALL: [Self; 5] = [
        Self::Drain,
        Self::Save,
        Self::Instantiate,
        Self::Initialize,
        Self::Restore,
    ];

    /// The word for it in the public interface.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Save => "save",
            Self::Instantiate => "instantiate",
            Self::Initialize => "initialize",
            Self::Restore => "restore",
        }
    }
}

impl fmt::Display for FailedPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_swap_passes_every_phase_once_and_serves_again() {
        let mut seen = vec![Phase::default()];
        let mut phase = Phase::default().advance();
        while phase != Phase::Serving {
            seen.push(phase);
            phase = phase.advance();
        }
        assert_eq!(seen.len(), 7);
        assert!(seen.is_sorted());
    }

    #[test]
    fn a_failure_returns_to_serving_from_any_phase_before_commit() {
        let mut phase = Phase::Serving;
        while !phase.is_committed() {
            assert_eq!(phase.on_failure(), Phase::Serving);
            phase = phase.advance();
        }
        assert_eq!(phase.on_failure(), Phase::Committed);
    }

    #[test]
    fn calls_wait_from_gated_on() {
        assert!(!Phase::Instantiated.is_gated());
        assert!(Phase::Gated.is_gated());
        assert!(Phase::Committed.is_gated());
    }

    #[test]
    fn failed_phases_have_the_public_words() {
        assert_eq!(
            FailedPhase::ALL.map(FailedPhase::as_str),
            ["drain", "save", "instantiate", "initialize", "restore"]
        );
        assert_eq!(FailedPhase::Save.to_string(), "save");
    }
}
