-- What wrk asks, and what it says at the end.
--   wrk ... -s wrk.lua URL                      always the same request
--   wrk ... -s wrk.lua URL -- unique TAG        URL?x=TAG-1, URL?x=TAG-2, ...: no two requests alike
--   wrk ... -s wrk.lua URL -- files COUNT SEED  URL00000.bin to URL<COUNT - 1>.bin, shuffled, again and again

local function unique(tag)
   local number = 0
   return function()
      number = number + 1
      return wrk.format(nil, wrk.path .. "?x=" .. tag .. "-" .. number)
   end
end

local function files(count, seed)
   local requests, at = {}, 0
   for number = 1, count do
      requests[number] = wrk.format(nil, string.format("%s%05d.bin", wrk.path, number - 1))
   end
   math.randomseed(seed)
   for last = count, 2, -1 do
      local other = math.random(last)
      requests[last], requests[other] = requests[other], requests[last]
   end
   return function()
      at = at % count + 1
      return requests[at]
   end
end

-- wrk sends one ready request over and over, at less cost, unless a global "request" exists.
function init(args)
   if args[1] == "unique" then
      request = unique(args[2])
   elseif args[1] == "files" then
      request = files(tonumber(args[2]), tonumber(args[3]))
   end
end

function done(summary)
   local errors = summary.errors
   io.write(string.format(
      '\nsummary {"requests": %d, "bytes": %d, "seconds": %.6f, "errors": '
         .. '{"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
      summary.requests, summary.bytes, summary.duration / 1e6,
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
