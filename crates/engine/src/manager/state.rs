//! Where a manager is in its life.

/// Where a manager is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ManagerState {
    /// The first generation is not there yet.
    Starting,
    /// Serving.
    Ready,
    /// A swap waits for what is in flight.
    Draining,
    /// A swap is under way.
    Reloading,
    /// `close()` or `destroy()` was called.
    Closing,
    /// Everything is released.
    Closed,
    /// Nothing can serve; a reload may help.
    Failed,
}

impl ManagerState {
    pub(super) const ALL: [Self; 7] = [
        Self::Starting,
        Self::Ready,
        Self::Draining,
        Self::Reloading,
        Self::Closing,
        Self::Closed,
        Self::Failed,
    ];

    /// As callers see it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Reloading => "reloading",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Failed => "failed",
        }
    }
}
