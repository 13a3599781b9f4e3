// Stream an answer from a running service; the contract is read from proto/ at start.
// npm install && node client.js "Why is the sky blue?" [host:port]
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [question, server = "127.0.0.1:50051"] = process.argv.slice(2);
const contract = loader.loadSync("treeline/v1/generation.proto", {
  includeDirs: [path.join(__dirname, "../../proto")],
  keepCase: true,
  longs: String, // seeds have 64 bits
});
const { treeline } = grpc.loadPackageDefinition(contract);
const client = new treeline.v1.GenerationService(server, grpc.credentials.createInsecure());

const call = client.Generate(
  { chat: { messages: [{ role: "user", content: question }] }, stopping: { max_tokens: 100 } },
  { deadline: Date.now() + 60_000 },
);
call.on("data", ({ chunk, complete }) => {
  process.stdout.write(chunk ? chunk.text : `\n[${complete.usage.completion_tokens} tokens, seed ${complete.seed}]\n`);
});
call.on("error", ({ code, details }) => {
  console.error(`failed: ${grpc.status[code]}: ${details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
