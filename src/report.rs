//! Reports and statistics as plain objects.

use std::time::Duration;

use wasm_molt_engine::{
    Freed, Histogram, ManagerStats, MemoryUsage, Pressure, RecycleReport, ReloadReport, ReloadStep,
    ResetReport,
};

use crate::js::{Js, JsResult, Val};

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// `ReloadReport`.
pub(crate) fn reload(js: Js, report: &ReloadReport) -> JsResult<Val> {
    let object = js.object()?;
    let number = |name, v: f64| js.set(object, name, js.number(v)?);
    number(c"generation", report.generation.get() as f64)?;
    number(
        c"previousGeneration",
        report.previous_generation.get() as f64,
    )?;
    js.set(object, c"reason", js.string(&report.reason)?)?;
    js.set(object, c"strategy", js.string(report.strategy.as_str())?)?;
    number(c"drained", report.drained as f64)?;
    number(c"queued", report.queued as f64)?;
    number(c"pauseMs", ms(report.pause))?;
    number(c"drainMs", ms(report.drain))?;
    number(c"saveMs", ms(report.save))?;
    number(c"instantiateMs", ms(report.instantiate))?;
    number(c"restoreMs", ms(report.restore))?;
    number(c"memoryBytesBefore", report.memory_bytes_before as f64)?;
    number(c"memoryBytesAfter", report.memory_bytes_after as f64)?;
    Ok(object)
}

/// `RecycleReport`.
pub(crate) fn recycle(js: Js, report: &RecycleReport) -> JsResult<Val> {
    let object = reload(js, &report.reload)?;
    js.set(object, c"strategy", js.string(report.strategy.as_str())?)?;
    let number = |name, v: f64| js.set(object, name, js.number(v)?);
    number(c"instance", report.slot as f64)?;
    number(c"calls", report.calls as f64)?;
    number(c"ageMs", ms(report.age))?;
    let Freed {
        expected_bytes,
        returned_bytes,
    } = report.freed;
    number(c"expectedBytes", expected_bytes as f64)?;
    if let Some(returned) = returned_bytes {
        number(c"returnedBytes", returned as f64)?;
    }
    Ok(object)
}

/// `Pressure`.
pub(crate) fn pressure(js: Js, pressure: &Pressure) -> JsResult<Val> {
    let object = js.object()?;
    let number = |name, v: f64| js.set(object, name, js.number(v)?);
    js.set(object, c"reason", js.string(pressure.reason.as_str())?)?;
    number(c"instance", pressure.slot as f64)?;
    number(c"generation", pressure.generation.get() as f64)?;
    number(c"memoryBytes", pressure.memory_bytes as f64)?;
    if let Some(threshold) = pressure.threshold_bytes {
        number(c"thresholdBytes", threshold as f64)?;
    }
    number(c"calls", pressure.calls as f64)?;
    number(c"growthBytesPerCall", pressure.growth_bytes_per_call)?;
    Ok(object)
}

/// `[expectedBytes, returnedBytes]`
pub(crate) fn freed(js: Js, freed: &Freed) -> JsResult<Val> {
    let pair = js.array(2)?;
    js.set_element(pair, 0, js.number(freed.expected_bytes as f64)?)?;
    let returned = freed.returned_bytes.unwrap_or_default();
    js.set_element(pair, 1, js.number(returned as f64)?)?;
    Ok(pair)
}

/// `ReloadStep`.
pub(crate) fn step(js: Js, manager: &str, step: &ReloadStep) -> JsResult<Val> {
    let object = js.object()?;
    js.set(object, c"manager", js.string(manager)?)?;
    let generation = js.number(step.generation.get() as f64)?;
    js.set(object, c"generation", generation)?;
    js.set(object, c"reason", js.string(&step.reason)?)?;
    js.set(object, c"strategy", js.string(step.strategy.as_str())?)?;
    js.set(object, c"step", js.string(step.step.as_str())?)?;
    js.set(object, c"durationMs", js.number(ms(step.took))?)?;
    Ok(object)
}

/// `ResetReport`.
pub(crate) fn reset(js: Js, report: &ResetReport) -> JsResult<Val> {
    let object = js.object()?;
    let number = |name, v: f64| js.set(object, name, js.number(v)?);
    number(c"generation", report.generation.get() as f64)?;
    number(c"memoryBytesBefore", report.memory_bytes_before as f64)?;
    number(c"memoryBytesAfter", report.memory_bytes_after as f64)?;
    number(c"dirtyBytes", report.dirty_bytes as f64)?;
    number(c"durationMs", ms(report.took))?;
    Ok(object)
}

/// `ManagerStats`.
///
/// * `usage`: what linear memory really takes, if somebody asked.
pub(crate) fn stats(js: Js, stats: &ManagerStats, usage: Option<&MemoryUsage>) -> JsResult<Val> {
    let object = js.object()?;
    let number = |object, name, v: f64| js.set(object, name, js.number(v)?);
    js.set(object, c"name", js.string(&stats.name)?)?;
    js.set(object, c"state", js.string(stats.state.as_str())?)?;
    number(object, c"generation", stats.generation as f64)?;
    let instances = js.object()?;
    number(instances, c"total", stats.gate.slots as f64)?;
    let busy = stats.gate.in_flight - stats.gate.stragglers;
    number(instances, c"busy", busy as f64)?;
    number(instances, c"poisoned", stats.poisoned as f64)?;
    js.set(object, c"instances", instances)?;
    number(object, c"inFlight", stats.gate.in_flight as f64)?;
    number(object, c"queued", stats.gate.queued as f64)?;
    number(object, c"memoryBytes", stats.memory_bytes as f64)?;
    number(object, c"memoryBytesPeak", stats.memory_bytes_peak as f64)?;
    let calls = js.object()?;
    number(calls, c"completed", stats.calls.completed as f64)?;
    number(calls, c"failed", stats.calls.failed as f64)?;
    number(calls, c"trapped", stats.calls.trapped as f64)?;
    number(calls, c"interrupted", stats.calls.interrupted as f64)?;
    number(calls, c"rejected", stats.calls.rejected as f64)?;
    js.set(object, c"calls", calls)?;
    let reloads = js.object()?;
    for (reason, count) in &stats.reloads {
        js.define(reloads, reason, js.number(*count as f64)?)?;
    }
    js.set(object, c"reloads", reloads)?;
    number(object, c"reloadsFailed", stats.reloads_failed as f64)?;
    number(object, c"recyclesDue", stats.recycles_due as f64)?;
    number(object, c"resets", stats.resets as f64)?;
    number(object, c"snapshots", stats.snapshots as f64)?;
    if let Some(usage) = usage {
        let pages = js.object()?;
        number(pages, c"privateBytes", usage.private_bytes as f64)?;
        number(pages, c"sharedBytes", usage.shared_bytes as f64)?;
        number(pages, c"reservedBytes", usage.reserved_bytes as f64)?;
        js.set(object, c"pages", pages)?;
    }
    js.set(object, c"runTime", histogram(js, &stats.times.run)?)?;
    js.set(object, c"waitTime", histogram(js, &stats.times.wait)?)?;
    js.set(object, c"pauseTime", histogram(js, &stats.times.pause)?)?;
    Ok(object)
}

fn histogram(js: Js, h: &Histogram) -> JsResult<Val> {
    let object = js.object()?;
    let number = |name, v: f64| js.set(object, name, js.number(v)?);
    number(c"count", h.count as f64)?;
    number(c"min", h.min)?;
    number(c"mean", h.mean)?;
    number(c"p50", h.p50)?;
    number(c"p90", h.p90)?;
    number(c"p99", h.p99)?;
    number(c"p999", h.p999)?;
    number(c"max", h.max)?;
    Ok(object)
}
