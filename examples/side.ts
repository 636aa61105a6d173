// Each side of a comparison runs in a process of its own, so that each has its own memory to show.
import { fork } from 'node:child_process'

/** Starts one side and takes its messages until it ends; answers with how it ended: null, or a signal, or an exit code. */
export function follow<Message>(
  program: string,
  args: string[],
  onMessage: (message: Message) => void,
): Promise<string | null> {
  const child = fork(program, args, { execArgv: ['--import', 'tsx'] })
  child.on('message', onMessage)
  return new Promise((done) => {
    child.on('exit', (code, signal) => done(signal ?? (code === 0 ? null : `exit code ${code}`)))
  })
}

/** Tells the process that started this one. */
export function send(message: object): Promise<void> {
  return new Promise((sent, failed) => {
    if (!process.send) throw new Error('this is one side of the demo; the demo starts it')
    process.send(message, undefined, {}, (error) => (error ? failed(error) : sent()))
  })
}
