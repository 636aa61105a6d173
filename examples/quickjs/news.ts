// What a way of running scripts tells the demo.

/** What a way tells since its last news. */
export interface News {
  scripts: number
  /** Scripts that have an end, and answered, or threw, what was expected. */
  right: number
  /** Answered something else. */
  wrong: number
  /** Threw what was not expected, or were stopped. */
  failed: number
  /** The first script that had not enough memory. */
  firstFull?: number
  /** Found something that another had left. */
  leftovers: number
  /** What was found, each thing once. */
  found: string[]
  /** Endless scripts that were stopped, and those that were left out because nothing could stop them. */
  stopped: number
  leftOut: number
  /** [script, bytes of linear memory in use] whenever that changed; only where pages can be counted. */
  samples: [number, number][]
}

export interface Ending {
  /** Of each script that has an end. */
  timesMs: number[]
  /** To make what stays: the manager and its warm interpreter, or the compiled module. */
  startMs: number
  rssBytes: number
  rssBytesPeak: number
  /** Where a manager runs the scripts: how often it needed another instance. */
  generation?: number
}

export function noNews(): News {
  return { scripts: 0, right: 0, wrong: 0, failed: 0, leftovers: 0, found: [], stopped: 0, leftOut: 0, samples: [] }
}
