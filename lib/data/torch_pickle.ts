/**
 * The pickle inside a PyTorch checkpoint, read as data: dictionaries, lists, plain values and tensors that point into storages.
 * Refuses every opcode and global that a state dict does not need, names it, and never executes anything.
 * Opcodes: CPython Lib/pickletools.py.
 */
import type { Dtype } from "./dtype.ts";

/** A storage file of the archive: `count` values in `data/<key>`. */
export interface Storage {
  readonly kind: "storage";
  readonly dtype: Dtype;
  readonly key: string;
  readonly count: number;
}
/** A tensor: a strided view of a storage, `offset` and `stride` in elements. */
export interface TensorView {
  readonly kind: "tensor";
  readonly storage: Storage;
  readonly offset: number;
  readonly shape: readonly number[];
  readonly stride: readonly number[];
}
interface Global {
  readonly kind: "global";
  readonly name: string;
}
/** What a pickle of a state dict can hold; lists and tuples are both arrays. */
export type Value = null | boolean | number | bigint | string | Value[] | Dict | Storage | TensorView | Global;
/** A dictionary in the order of its insertions. */
export type Dict = Map<Value, Value>;

const STORAGES: Readonly<Record<string, Dtype>> = {
  "torch.DoubleStorage": "F64",
  "torch.FloatStorage": "F32",
  "torch.HalfStorage": "F16",
  "torch.BFloat16Storage": "BF16",
  "torch.LongStorage": "I64",
  "torch.IntStorage": "I32",
  "torch.ShortStorage": "I16",
  "torch.CharStorage": "I8",
  "torch.ByteStorage": "U8",
  "torch.BoolStorage": "BOOL",
};
const CALLS = ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"];

/** Whether a value is a tensor. */
export function isView(value: Value): value is TensorView {
  return typeof value === "object" && value !== null && "kind" in value && value.kind === "tensor";
}

/**
 * Runs the pickle program `bytes` of the archive `path` on a stack of plain values. The three callables it knows are cases of
 * `reduce`, not functions it looks up; throws a RangeError that names the opcode or global it does not know.
 */
export function unpickle(bytes: Uint8Array, path: string): Value {
  const refuse = (problem: string): never => {
    throw new RangeError(`Cannot read "${path}": data.pkl ${problem}`);
  };
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const marks: number[] = [];
  const memo = new Map<number, Value>();
  const stack: Value[] = [];
  let at = 0;
  const take = (count: number): number => {
    at += count;
    return at <= bytes.length ? at - count : refuse("ends in the middle of an instruction");
  };
  const floor = () => marks.at(-1) ?? 0;
  const pop = (): Value => stack.length > floor() ? stack.pop()! : refuse(`takes from an empty stack at byte ${at}`);
  const popMark = (): Value[] => {
    const from = marks.pop() ?? refuse(`closes a list that it never opened at byte ${at}`);
    return stack.splice(from);
  };
  const top = (): Value => stack.length > floor() ? stack.at(-1)! : refuse(`looks at an empty stack at byte ${at}`);
  const text = (length: number): string => {
    const from = take(length);
    return new TextDecoder().decode(bytes.subarray(from, at));
  };
  const line = (): string => {
    const end = bytes.indexOf(10, at);
    const word = end < 0 ? refuse("ends in the middle of a name") : text(end - at);
    at++;
    return word;
  };
  const recall = (slot: number): Value =>
    memo.has(slot) ? memo.get(slot)! : refuse(`recalls the unknown value ${slot}`);
  const setItems = (items: Value[]) => {
    const dict = top();
    if (!(dict instanceof Map) || items.length % 2 !== 0) {
      return refuse(`sets items of something else than a dictionary`);
    }
    for (let i = 0; i < items.length; i += 2) dict.set(items[i]!, items[i + 1]!);
  };
  const append = (items: Value[]) => {
    const list = top();
    return Array.isArray(list) ? list.push(...items) : refuse(`appends to something else than a list at byte ${at}`);
  };
  const counts = (value: Value | undefined): number[] => {
    const whole = (item: Value): item is number => typeof item === "number" && Number.isSafeInteger(item) && item >= 0;
    return Array.isArray(value) && value.every(whole)
      ? value
      : refuse(`gives a tensor a shape or stride that is not whole numbers`);
  };
  const reduce = (callable: Value, args: Value): Value => {
    const name = typeof callable === "object" && callable !== null && "kind" in callable && callable.kind === "global"
      ? callable.name
      : "";
    if (!Array.isArray(args)) return refuse(`calls ${name} without arguments`);
    if (name === CALLS[0] && args.length === 0) return new Map();
    if (name === CALLS[1]) {
      const [storage, offset, shape, stride] = [args[0], counts([args[1]!])[0]!, counts(args[2]), counts(args[3])];
      const stored = typeof storage === "object" && storage !== null && "kind" in storage && storage.kind === "storage";
      if (!stored || shape.length !== stride.length) {
        return refuse("builds a tensor from something else than a storage");
      }
      return { kind: "tensor", storage, offset, shape, stride };
    }
    if (name === CALLS[2] && isView(args[0]!)) return args[0];
    return refuse(`calls ${name || "a value"} in a way that a state dict does not`);
  };
  const persistent = (id: Value): Storage => {
    const [word, type, key, , count] = Array.isArray(id) ? id : [];
    const name = typeof type === "object" && type !== null && "kind" in type && type.kind === "global" ? type.name : "";
    const dtype = Object.hasOwn(STORAGES, name) ? STORAGES[name] : undefined;
    if (word !== "storage" || dtype === undefined || typeof key !== "string" || !/^\w+$/.test(key)) {
      return refuse(`refers to a storage that is not one of torch's at byte ${at}`);
    }
    return { kind: "storage", dtype, key, count: counts([count!])[0]! };
  };

  for (;;) {
    const from = take(1);
    const code = bytes[from]!;
    const opcode = String.fromCharCode(code);
    if (opcode === ".") {
      const result = pop();
      return stack.length === 0 && at === bytes.length ? result : refuse("has more than one value");
    } else if (code === 0x80) { // PROTO
      const version = bytes[take(1)]!;
      if (version !== 2) refuse(`is of pickle protocol ${version}: torch.save writes protocol 2 unless told otherwise`);
    } else if (opcode === "c") { // GLOBAL
      const name = `${line()}.${line()}`;
      if (!CALLS.includes(name) && !Object.hasOwn(STORAGES, name)) {
        refuse(
          `refers to ${name}: only tensors, dictionaries, lists and plain values are read, and nothing is executed`,
        );
      }
      stack.push({ kind: "global", name });
    } else if (opcode === "}") stack.push(new Map());
    else if (opcode === "]" || opcode === ")") stack.push([]);
    else if (opcode === "(") marks.push(stack.length);
    else if (opcode === "t") stack.push(popMark());
    else if (code >= 0x85 && code <= 0x87) { // TUPLE1, TUPLE2, TUPLE3
      const items = Array.from({ length: code - 0x84 }, pop).reverse();
      stack.push(items);
    } else if (opcode === "X") stack.push(text(data.getUint32(take(4), true)));
    else if (opcode === "K") stack.push(bytes[take(1)]!);
    else if (opcode === "M") stack.push(data.getUint16(take(2), true));
    else if (opcode === "J") stack.push(data.getInt32(take(4), true));
    else if (opcode === "G") stack.push(data.getFloat64(take(8)));
    else if (code === 0x8a) { // LONG1: little-endian two's complement
      const length = bytes[take(1)]!;
      const digits = bytes.subarray(take(length), at).reduceRight((sum, byte) => sum << 8n | BigInt(byte), 0n);
      const value = BigInt.asIntN(8 * length, digits);
      stack.push(BigInt(Number(value)) === value && Number.isSafeInteger(Number(value)) ? Number(value) : value);
    } else if (opcode === "N") stack.push(null);
    else if (code === 0x88 || code === 0x89) stack.push(code === 0x88);
    else if (opcode === "q") memo.set(bytes[take(1)]!, top());
    else if (opcode === "r") memo.set(data.getUint32(take(4), true), top());
    else if (opcode === "h") stack.push(recall(bytes[take(1)]!));
    else if (opcode === "j") stack.push(recall(data.getUint32(take(4), true)));
    else if (opcode === "s") setItems([pop(), pop()].reverse());
    else if (opcode === "u") setItems(popMark());
    else if (opcode === "a") append([pop()]);
    else if (opcode === "e") append(popMark());
    else if (opcode === "Q") stack.push(persistent(pop()));
    else if (opcode === "R") {
      const args = pop();
      stack.push(reduce(pop(), args));
    } else if (opcode === "b") { // BUILD: a state dict carries its modules' version numbers as an attribute, of no use here
      pop();
      if (!(top() instanceof Map)) refuse(`sets attributes of something else than a dictionary at byte ${at}`);
    } else {refuse(
        `uses the opcode 0x${code.toString(16).padStart(2, "0")} at byte ${from}: a state dict does not need it`,
      );}
  }
}
