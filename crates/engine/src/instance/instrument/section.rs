//! The sections of a module, and their order.

/// The sections in their order.
pub(super) const ORDER: [u8; 13] = [
    TYPE, IMPORT, FUNCTION, TABLE, MEMORY, TAG, GLOBAL, EXPORT, START, ELEMENT, DATA_COUNT, CODE,
    DATA,
];
pub(super) const TYPE: u8 = 1;
pub(super) const IMPORT: u8 = 2;
pub(super) const FUNCTION: u8 = 3;
pub(super) const TABLE: u8 = 4;
pub(super) const MEMORY: u8 = 5;
pub(super) const GLOBAL: u8 = 6;
pub(super) const EXPORT: u8 = 7;
pub(super) const START: u8 = 8;
pub(super) const ELEMENT: u8 = 9;
pub(super) const CODE: u8 = 10;
pub(super) const DATA: u8 = 11;
pub(super) const DATA_COUNT: u8 = 12;
pub(super) const TAG: u8 = 13;

/// Where a section has its place among the others. Custom sections stand anywhere.
pub(super) fn rank(id: u8) -> Option<usize> {
    ORDER.iter().position(|known| *known == id)
}
