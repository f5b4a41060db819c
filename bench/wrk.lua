-- What wrk asks, and what it says at the end.
--   wrk ... -s wrk.lua URL                      always the same request
--   wrk ... -s wrk.lua URL -- unique TAG        URL?x=TAG-1, URL?x=TAG-2, ...: no two requests alike
--   wrk ... -s wrk.lua URL -- files COUNT SEED  URL00000.bin to URL<COUNT - 1>.bin, shuffled, again and again
--   wrk ... -s wrk.lua URL -- mix COUNT TAG     URL is that of page 0, which ends with 0.html. What browsers ask of COUNT
--                                               such pages; TAG, hexadecimal digits, has it differ from one run to another

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

-- User agents, referers, cookies and validators differ as they do between visitors, so hardly two requests are alike.
local function mix(count, tag)
   local format, random = string.format, math.random
   local pages = assert(wrk.path:match("^(.*)0%.html$"), "the URL does not end with 0.html")
   local site, number = "www.example.org", 0
   local agents = {
      [0] = function(version)
         return format("Mozilla/5.0 (iPhone; CPU iPhone OS 17_%d like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
            .. "Version/17.%d Mobile/15E148 Safari/604.1", version % 9, version % 7)
      end,
      function(version)
         return format("Mozilla/5.0 (X11; Linux x86_64; rv:%d.0) Gecko/20100101 Firefox/%d.0", version, version)
      end,
      function(version)
         return format("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
            .. "Chrome/%d.0.0.0 Safari/537.36", version)
      end,
   }
   agents[3] = agents[2]
   math.randomseed(tonumber(tag:sub(1, 8), 16))
   return function()
      number = number + 1
      local visitor = random(1, 999999999)
      local lines = {
         format("GET %s%d.html HTTP/1.1", pages, random(0, count - 1)),
         "Host: " .. site,
         "User-Agent: " .. agents[number % 4](random(90, 130)),
         "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
         "Accept-Language: en-US,en;q=0.5",
         "Accept-Encoding: gzip, deflate, br, zstd",
      }
      local function add(...)
         lines[#lines + 1] = format(...)
      end
      if number % 3 > 0 then
         add("Referer: https://%s%s%d.html", site, pages, random(0, count - 1))
      end
      if number % 2 == 0 then
         add("Cookie: _ga=GA1.1.%d.%d; theme=dark; session=%x", visitor, 1700000000 + visitor % 50000000, visitor)
      end
      if number % 5 == 0 then
         add('If-None-Match: "%x"', visitor * 7)
         add("If-Modified-Since: Mon, 23 Nov 2026 0%d:%02d:00 GMT", visitor % 10, visitor % 60)
      end
      add("Connection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: document\r\n"
         .. "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\nPriority: u=0, i\r\n\r\n")
      return table.concat(lines, "\r\n")
   end
end

-- wrk sends one ready request over and over, at less cost, unless a global "request" exists.
function init(args)
   if args[1] == "unique" then
      request = unique(args[2])
   elseif args[1] == "files" then
      request = files(tonumber(args[2]), tonumber(args[3]))
   elseif args[1] == "mix" then
      request = mix(tonumber(args[2]), args[3])
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
