//! Where the decisions of a random test come from: a seed that is printed, or the bytes of a fuzzer.

/// Dice that fall the same way each time.
#[derive(Debug)]
pub struct Dice<'a>(Source<'a>);

#[derive(Debug)]
enum Source<'a> {
    Seed(u64),
    Bytes(&'a [u8]),
}

impl Dice<'static> {
    /// As many rolls as wanted.
    pub fn seeded(seed: u64) -> Self {
        Self(Source::Seed(seed))
    }
}

impl<'a> Dice<'a> {
    /// One roll after the other out of these bytes; then [`Self::is_over`], and only zeros.
    pub fn read(bytes: &'a [u8]) -> Self {
        Self(Source::Bytes(bytes))
    }

    /// Nothing is left to decide with.
    pub fn is_over(&self) -> bool {
        matches!(self.0, Source::Bytes([]))
    }

    /// A number below `sides`, which is at least 1.
    pub fn roll(&mut self, sides: usize) -> usize {
        match &mut self.0 {
            Source::Seed(state) => {
                // splitmix64
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((z ^ (z >> 31)) % sides as u64) as usize
            }
            Source::Bytes(bytes) => {
                // No more of them than the answer needs: a byte that is changed then changes one decision.
                let wanted = match sides {
                    0..=0x100 => 1,
                    0x101..=0x1_0000 => 2,
                    0x1_0001..=0x1_0000_0000 => 4,
                    _ => 8,
                };
                let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
                *bytes = rest;
                let number = taken
                    .iter()
                    .fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
                (number % sides as u64) as usize
            }
        }
    }

    /// Any number, of 64 bits.
    pub fn number(&mut self) -> u64 {
        (self.roll(1 << 32) as u64) << 32 | self.roll(1 << 32) as u64
    }

    /// So many bytes, or fewer where there are no more.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len && !self.is_over() {
            bytes.push(self.roll(256) as u8);
        }
        bytes
    }
}
