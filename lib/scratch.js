'use strict'

const binding = require('./binding.js')

// Numbers cross in memory that both sides see: stores cost less than Node-API calls. That all exports call
// one and the same native function lets V8 call it directly, also where a call site meets many exports.
const scratch = binding.newScratch()
const f64 = new Float64Array(scratch)
const i32 = new Int32Array(scratch)
// In this place native code counts what makes a LinearMemory mean another buffer.
const EPOCH = 7
// And here, whether the call that has just come back has an answer.
const IS_ANSWERED = 8

module.exports = { scratch, f64, i32, EPOCH, IS_ANSWERED }
